//! What has changed in a page that was sent before.
//!
//! A delta is a run of *stretches*, one behind the other until its bytes end. Of the page's 512 words of 8 bytes each stretch skips
//! some that are as before, and says of those that follow what they were and are now, combined by exclusive or: in counters and
//! pointers that is mostly zeros, which pack well.
//!
//! ```text
//! stretch = varint: words skipped, at least 1 but for the first stretch
//!         ‖ varint: words that follow, at least 1
//!         ‖ the words, 8 bytes each, none of them zero
//! ```
//!
//! A page that did not change has the delta of no bytes. So each change has one encoding, and that it is one can be seen without the
//! previous page. A delta is at most half a page long: of more, the whole page costs little more and needs nothing kept.
//!
//! Measured in `docs/performance.md`.

use thiserror::Error;

use crate::limits::PAGE_SIZE;

/// What a page holds.
pub type Page = [u8; PAGE_SIZE];

/// The most bytes of a delta.
pub const MAX_DELTA_LENGTH: usize = PAGE_SIZE / 2;
/// Bytes of a word.
const WORD: usize = 8;
/// Words of a page.
const WORDS: usize = PAGE_SIZE / WORD;
/// Words that are compared in one go where nothing has changed.
const STRIDE: usize = 16;

/// The bytes are no delta of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{length} bytes are no delta of a page")]
pub struct InvalidDelta {
    /// How many bytes there are.
    pub length: usize,
}

/// Appends the delta that makes `now` of `previous`. When that is more than [`MAX_DELTA_LENGTH`] bytes, appends nothing and says
/// `false`: the page is to be sent whole.
pub fn encode(previous: &Page, now: &Page, out: &mut Vec<u8>) -> bool {
    let begin = out.len();
    let ((before, _), (after, _)) = (previous.as_chunks::<WORD>(), now.as_chunks::<WORD>());
    let mut at = 0;
    loop {
        let start = at + same(&before[at..], &after[at..]);
        if start == WORDS {
            return true;
        }
        let most = out.len() - begin;
        let changed = before[start..].iter().zip(&after[start..]).take_while(|(before, after)| before != after).count();
        let length = varint_length(start - at) + varint_length(changed) + changed * WORD;
        if most + length > MAX_DELTA_LENGTH {
            out.truncate(begin);
            return false;
        }
        put_varint(out, start - at);
        put_varint(out, changed);
        at = start + changed;
        for (before, after) in before[start..at].iter().zip(&after[start..at]) {
            out.extend_from_slice(&xor(*before, *after));
        }
    }
}

/// Makes of `page`, which is the previous one, what it is now. After an error it may be neither.
pub fn decode(page: &mut Page, delta: &[u8]) -> Result<(), InvalidDelta> {
    let (words, _) = page.as_chunks_mut::<WORD>();
    walk(delta, |start, changes| {
        for (word, change) in words[start..].iter_mut().zip(changes) {
            *word = xor(*word, *change);
        }
    })
}

/// Whether these bytes are a delta, of whatever page.
pub fn check(delta: &[u8]) -> Result<(), InvalidDelta> {
    walk(delta, |_, _| ())
}

/// Goes through a delta's stretches: the first word of each and how its words change. They lie inside the page.
fn walk(delta: &[u8], mut stretch: impl FnMut(usize, &[[u8; WORD]])) -> Result<(), InvalidDelta> {
    let invalid = InvalidDelta { length: delta.len() };
    let (mut rest, mut at) = (delta, 0);
    if delta.len() > MAX_DELTA_LENGTH {
        return Err(invalid);
    }
    while !rest.is_empty() {
        let skipped = take_varint(&mut rest).filter(|skipped| *skipped > 0 || at == 0).ok_or(invalid)?;
        let count = take_varint(&mut rest).filter(|count| *count > 0).ok_or(invalid)?;
        let start = at + skipped;
        at = start + count;
        let changes = rest.split_off(..count * WORD).filter(|_| at <= WORDS).ok_or(invalid)?;
        let (changes, _) = changes.as_chunks::<WORD>();
        if changes.contains(&[0; WORD]) {
            return Err(invalid);
        }
        stretch(start, changes);
    }
    Ok(())
}

/// How many words at the beginning are the same.
fn same(before: &[[u8; WORD]], after: &[[u8; WORD]]) -> usize {
    let strides = before.chunks_exact(STRIDE).zip(after.chunks_exact(STRIDE));
    let whole = strides.take_while(|(before, after)| before == after).count() * STRIDE;
    let single = before[whole..].iter().zip(&after[whole..]);
    whole + single.take_while(|(before, after)| before == after).count()
}

fn xor(one: [u8; WORD], other: [u8; WORD]) -> [u8; WORD] {
    (u64::from_ne_bytes(one) ^ u64::from_ne_bytes(other)).to_ne_bytes()
}

/// The largest number in one byte, one more.
const ONE_BYTE: usize = 0x80;
/// And in two.
const TWO_BYTES: usize = ONE_BYTE * ONE_BYTE;

const fn varint_length(number: usize) -> usize {
    if number < ONE_BYTE { 1 } else { 2 }
}

/// As in protobuf: seven bits a byte, the low ones first. All numbers here fit two bytes.
#[expect(clippy::cast_possible_truncation, reason = "below 2^14, seven bits each")]
pub(crate) fn put_varint(out: &mut Vec<u8>, number: usize) {
    debug_assert!(number < TWO_BYTES);
    if number < ONE_BYTE {
        out.push(number as u8);
    } else {
        out.extend_from_slice(&[(number % ONE_BYTE + ONE_BYTE) as u8, (number / ONE_BYTE) as u8]);
    }
}

/// A number in its shortest encoding.
pub(crate) fn take_varint(bytes: &mut &[u8]) -> Option<usize> {
    let low = usize::from(*bytes.split_off_first()?);
    if low < ONE_BYTE {
        return Some(low);
    }
    let high = usize::from(*bytes.split_off_first()?);
    (1..ONE_BYTE).contains(&high).then_some(low - ONE_BYTE + high * ONE_BYTE)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A page of noise, and what some writes make of it.
    fn written() -> impl Strategy<Value = (Page, Page)> {
        let write = (0..PAGE_SIZE, prop::collection::vec(any::<u8>(), 0..200));
        (any::<u64>(), prop::collection::vec(write, 0..20)).prop_map(|(seed, writes)| {
            let mut previous = [0; PAGE_SIZE];
            let mut state = seed | 1;
            for word in previous.as_chunks_mut::<WORD>().0 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).rotate_left(17);
                *word = state.to_ne_bytes();
            }
            let mut now = previous;
            for (at, bytes) in writes {
                let end = PAGE_SIZE.min(at + bytes.len());
                now[at..end].copy_from_slice(&bytes[..end - at]);
            }
            (previous, now)
        })
    }

    fn delta(previous: &Page, now: &Page) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        encode(previous, now, &mut out).then_some(out)
    }

    proptest! {
        #[test]
        fn a_delta_makes_the_page_what_it_is_now((previous, now) in written()) {
            let mut out = b"before".to_vec();
            if encode(&previous, &now, &mut out) {
                let delta = out.strip_prefix(b"before").unwrap();
                prop_assert_eq!(check(delta), Ok(()));
                let mut page = previous;
                prop_assert_eq!(decode(&mut page, delta), Ok(()));
                prop_assert!(page == now);
            } else {
                prop_assert_eq!(out, b"before");
            }
        }

        #[test]
        fn noise_is_refused_or_is_the_only_delta_of_its_page(noise in prop::collection::vec(any::<u8>(), 0..60)) {
            let previous = [0x5a; PAGE_SIZE];
            let mut now = previous;
            let decoded = decode(&mut now, &noise);
            prop_assert_eq!(decoded, check(&noise));
            if decoded.is_ok() {
                prop_assert_eq!(delta(&previous, &now), Some(noise));
            }
        }

        #[test]
        fn a_damaged_delta_is_refused_or_is_another((previous, now) in written(), at in any::<prop::sample::Index>(), bits in 1..=u8::MAX) {
            let Some(mut damaged) = delta(&previous, &now).filter(|delta| !delta.is_empty()) else { return Ok(()) };
            let at = at.index(damaged.len());
            damaged[at] ^= bits;
            let mut page = previous;
            if decode(&mut page, &damaged).is_ok() {
                prop_assert!(page != now);
                prop_assert_eq!(delta(&previous, &page), Some(damaged));
            }
        }

        #[test]
        fn numbers_survive(number in 0..TWO_BYTES) {
            let mut out = Vec::new();
            put_varint(&mut out, number);
            prop_assert_eq!(out.len(), varint_length(number));
            prop_assert_eq!(take_varint(&mut &out[..]), Some(number));
        }
    }

    #[test]
    fn a_changed_counter_costs_eleven_bytes_and_nothing_changed_none() {
        let previous = [7; PAGE_SIZE];
        assert_eq!(delta(&previous, &previous), Some(vec![]));
        for (at, length) in [(0, 10), (100 * WORD, 10), (300 * WORD, 11), (PAGE_SIZE - WORD, 11)] {
            let mut now = previous;
            now[at] = 8;
            assert_eq!(delta(&previous, &now).unwrap().len(), length, "{at}");
        }
    }

    #[test]
    fn more_than_half_a_page_is_not_worth_it() {
        let previous = [0; PAGE_SIZE];
        for (words, worth) in [(255, true), (256, false), (WORDS, false)] {
            let mut now = previous;
            now[..words * WORD].fill(1);
            assert_eq!(delta(&previous, &now).is_some(), worth, "{words}");
        }
    }

    #[test]
    fn what_is_no_delta_is_refused() {
        let word = [1; WORD];
        let with = |numbers: &[u8], words: usize| [numbers, &word.repeat(words)].concat();
        let refused = [
            vec![0],
            vec![0, 0],
            with(&[0, 1], 0),
            [with(&[0, 1], 1), vec![0]].concat(),
            // Two stretches that touch are one.
            [with(&[0, 1], 1), with(&[0, 1], 1)].concat(),
            // A word that does not change.
            vec![0, 1, 0, 0, 0, 0, 0, 0, 0, 0],
            // One byte would do.
            with(&[0x81, 0, 1], 1),
            // Three bytes.
            with(&[0x80, 0x80, 1, 1], 1),
            // Behind the end.
            with(&[0x80, 4, 1], 1),
            with(&[0xff, 3, 2], 2),
            with(&[0xff, 0x7f, 0xff, 0x7f], 200),
            // Longer than it may be.
            with(&[0, 0x80, 2], 256),
        ];
        for delta in refused {
            assert_eq!(check(&delta), Err(InvalidDelta { length: delta.len() }), "{delta:?}");
            assert!(decode(&mut [0; PAGE_SIZE], &delta).is_err());
        }
        assert_eq!(check(&with(&[0xff, 3, 1], 1)), Ok(()), "the last word");
    }
}
