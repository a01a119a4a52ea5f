//! Lays pages that are here already into segments of shared memory that CRIU restores.
//!
//! CRIU restores a segment, in the process that has it, in three steps (`restore_memfd_shmem_content` in `criu/shmem.c`): it gives a
//! new memfd its length with ftruncate(2), maps it, and opens `pagemap-shmem-NUMBER.img` for the pages that go there. The dump was kept
//! from the pages of a segment that had been sent ([`crate`]), so none are listed, or those that are belong on top. So when that image is
//! opened, what was kept of the segment is written to the file that was given a length last.
//!
//! Which pages that are, an index says (`podferry_memory::shared::laying`). It is read when CRIU asks which processes there are: it has
//! its inventory then, for which a restore that was started early waits, so everything is here; and it makes processes later, which see
//! other files and inherit what this one has mapped. CRIU fails at the image at hand when something is not as the index says: a segment
//! must not come to be zero instead.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::RawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};

use crate::mapping;

/// The environment variable that names the index; `podferry_memory::shared::laying` writes it.
const VARIABLE: &str = "PODFERRY_CRIU_SHARED";
const PROCESSES: &[u8] = b"pstree.img";
const IMAGE: (&str, &str) = ("pagemap-shmem-", ".img");

/// The file that was given a length last.
static LAST_SIZED: AtomicI32 = AtomicI32::new(-1);
static SEGMENTS: OnceLock<Vec<Segment>> = OnceLock::new();

/// What is kept of a segment.
#[derive(Debug)]
struct Segment {
    number: u64,
    kept: &'static [u8],
    runs: Vec<Run>,
    laid: Option<&'static AtomicU8>,
}

/// Pages that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    offset: u64,
    place: usize,
    length: usize,
}

/// What the index says of a segment.
#[derive(Debug, PartialEq, Eq)]
struct Described {
    number: u64,
    bytes: usize,
    path: String,
    runs: Vec<Run>,
}

/// CRIU gives a file its length.
pub(crate) fn sized(fd: RawFd) {
    LAST_SIZED.store(fd, Ordering::Relaxed);
}

/// CRIU opens an image.
///
/// # Errors
/// When CRIU must not go on.
pub(crate) fn opens(name: &[u8]) -> io::Result<()> {
    if name == PROCESSES {
        return prepare();
    }
    let number = std::str::from_utf8(name).ok().and_then(|name| name.strip_prefix(IMAGE.0)?.strip_suffix(IMAGE.1));
    let Some(number) = number.and_then(|number| number.parse().ok()) else { return Ok(()) };
    let segment = SEGMENTS.get().and_then(|segments| segments.iter().find(|segment| segment.number == number));
    segment.map_or(Ok(()), |segment| segment.lay_into(LAST_SIZED.load(Ordering::Relaxed)))
}

fn prepare() -> io::Result<()> {
    let Some(path) = std::env::var_os(VARIABLE).filter(|_| SEGMENTS.get().is_none()) else { return Ok(()) };
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let (laid, described) = parse(&text).ok_or(ErrorKind::InvalidData)?;
    let laid = mapping::flags(&File::options().read(true).write(true).open(laid)?)?;
    let segments = described.into_iter().zip(0..).map(|(described, index)| described.open(laid.get(index)));
    let _alone = SEGMENTS.set(segments.collect::<io::Result<_>>()?);
    Ok(())
}

/// Where it is noted what was laid in, and the segments.
fn parse(text: &str) -> Option<(&str, Vec<Described>)> {
    let mut lines = text.lines();
    let laid = lines.next()?.strip_prefix("laid ")?;
    let mut segments: Vec<Described> = Vec::new();
    for line in lines {
        match line.strip_prefix("segment ") {
            Some(segment) => segments.push(Described::parse(segment)?),
            None => segments.last_mut()?.add(line)?,
        }
    }
    Some((laid, segments))
}

impl Described {
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.splitn(3, ' ');
        let number = words.next()?.parse().ok()?;
        let bytes = usize::from_str_radix(words.next()?, 16).ok()?;
        Some(Self { number, bytes, path: words.next()?.to_owned(), runs: Vec::new() })
    }

    fn add(&mut self, line: &str) -> Option<()> {
        let mut words = line.split(' ').map(|word| u64::from_str_radix(word, 16).ok());
        let mut word = || words.next().flatten();
        let (offset, place, length) = (word()?, usize::try_from(word()?).ok()?, usize::try_from(word()?).ok()?);
        (place.checked_add(length)? <= self.bytes).then(|| self.runs.push(Run { offset, place, length }))
    }

    fn open(self, laid: Option<&'static AtomicU8>) -> io::Result<Segment> {
        let kept = mapping::contents(&File::open(&self.path)?, self.bytes)?;
        Ok(Segment { number: self.number, kept, runs: self.runs, laid })
    }
}

impl Segment {
    /// Writes everything into a file, up to its end.
    fn lay_into(&self, fd: RawFd) -> io::Result<()> {
        let file = mapping::Borrowed::of(fd)?;
        let size = file.length()?;
        for run in &self.runs {
            let room = usize::try_from(size.saturating_sub(run.offset)).unwrap_or(usize::MAX);
            file.write(&self.kept[run.place..run.place + run.length.min(room)], run.offset)?;
        }
        if let Some(laid) = self.laid {
            laid.store(1, Ordering::Release);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;
    use std::os::unix::fs::FileExt as _;

    use podferry_memory::range::PageRange;
    use podferry_memory::shared::laying;

    use super::*;

    #[test]
    fn what_was_kept_comes_to_its_place_and_not_beyond_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = laying::store(folder.path(), 7, 8 << 20).unwrap();
        store.put(PageRange::new(0x20_1000, 0x20_3000), &[[1; 4096], [2; 4096]].concat()).unwrap();
        store.put(PageRange::new(0x1000, 0x2000), &[3; 4096]).unwrap();
        laying::write(folder.path(), [(7, &store)]).unwrap();
        assert_eq!(laying::VARIABLE, VARIABLE);
        let text = std::fs::read_to_string(laying::index(folder.path())).unwrap();
        let (laid, described) = parse(&text).unwrap();
        let laid = mapping::flags(&File::options().read(true).write(true).open(laid).unwrap()).unwrap();
        let segment = described.into_iter().next().unwrap().open(laid.first()).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x20_2010).unwrap();
        segment.lay_into(file.as_raw_fd()).unwrap();
        let mut found = vec![0; 0x20_2010];
        assert_eq!(file.read_at(&mut found, 0).unwrap(), found.len());
        assert_eq!(file.metadata().unwrap().len(), 0x20_2010);
        let expected = |index: usize| match index {
            0x1000..0x2000 => 3,
            0x20_1000..0x20_2000 => 1,
            0x20_2000.. => 2,
            _ => 0,
        };
        assert!(found.iter().enumerate().all(|(index, byte)| *byte == expected(index)));
        assert_eq!(laying::not_laid(folder.path()).unwrap(), [] as [u32; 0]);
    }

    #[test]
    fn an_index_that_is_none_is_not_taken_for_one() {
        assert_eq!(parse("laid /a b\n"), Some(("/a b", Vec::new())));
        for text in [
            "",
            "segment 7 0 /a\n",
            "laid /a\n0 0 0\n",
            "laid /a\nsegment x 0 /b\n",
            "laid /a\nsegment 7 0\n",
            "laid /a\nsegment 7 1000 /b\n0 1000 1000\n",
            "laid /a\nsegment 7 1000 /b\n0 0\n",
        ] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn images_of_other_segments_are_nothing_to_us() {
        for name in [&b"pagemap-shmem-77.img"[..], b"pagemap-shmem-x.img", b"pagemap-1.img", b"\xff"] {
            opens(name).unwrap();
        }
    }

    #[test]
    fn what_is_no_file_is_not_written_to() {
        let segment = Segment { number: 1, kept: &[], runs: Vec::new(), laid: None };
        assert!(segment.lay_into(-1).is_err());
        let (reader, _writer) = io::pipe().unwrap();
        assert!(segment.lay_into(reader.as_raw_fd()).is_err());
    }
}
