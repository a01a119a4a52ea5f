use podferry_transfer::{Changes, ZeroMap, is_zero};
use proptest::prelude::*;

use super::*;

fn list(ranges: &[(u64, u64)]) -> Vec<u8> {
    ranges.iter().flat_map(|(start, end)| [start.to_le_bytes(), end.to_le_bytes()]).flatten().collect()
}

#[test]
fn lists_that_make_no_sense_are_refused() {
    assert_eq!(parse(&list(&[(0x1000, 0x3000), (0x4000, 0x5000)])).unwrap().pages(), 3);
    for ranges in [
        &[(0x1000, 0x1000)][..],
        &[(0x2000, 0x1000)],
        &[(0x1001, 0x2000)],
        &[(0x1000, 0x2000), (0x2000, 0x3000)],
        &[(0x4000, 0x5000), (0x1000, 0x2000)],
        &[(0x1000, END_OF_ADDRESSES + PAGE_SIZE)],
    ] {
        assert!(parse(&list(ranges)).is_err(), "{ranges:?}");
    }
    assert!(parse(&[0; 15]).is_err());
}

const PAGE: usize = 4096;
const SEVEN: Owner = Owner::Process(7);

/// Memory of process 7 that has these pages, from address 0x1000 on.
fn arriving(folder: &tempfile::TempDir, pages: &[Page]) -> ArrivingMemory {
    let mut memory = ArrivingMemory::new(folder.path().to_owned(), false);
    memory.open(SEVEN).unwrap();
    let (bytes, count) = (pages.concat(), pages.len() as u64);
    let (zero, full) = (ZeroMap::find(&bytes), pages.iter().filter(|page| !is_zero(&page[..])));
    let bytes = full.flatten().copied().collect();
    let run = PageRun { object: 1, vaddr: 0x1000, count, flags: 0, zero, bytes, absent: false };
    memory.keep(SEVEN, &run).unwrap();
    memory
}

fn kept(memory: &ArrivingMemory, index: usize) -> &[u8] {
    let start = (index as u64 + 1) * PAGE_SIZE;
    memory.stores[&SEVEN].run(PageRange::new(start, start + PAGE_SIZE)).unwrap()
}

fn arrived(changes: Changes) -> Deltas {
    Deltas::arrived(1, changes).unwrap()
}

#[test]
fn changes_make_of_kept_pages_what_the_source_has() {
    let folder = tempfile::tempdir().unwrap();
    let before = [[1; PAGE], [0; PAGE], [3; PAGE], [4; PAGE]];
    let mut memory = arriving(&folder, &before);
    let mut now = before;
    now[0][100] = 7;
    // A zero page that is not any more, one that becomes zero but for what a delta can say, one that stays.
    now[1][PAGE - 1] = 9;
    now[3][8..16].fill(0);
    let mut changes = Changes::default();
    for (index, (before, now)) in before.iter().zip(&now).enumerate() {
        assert!(changes.add((index as u64 + 1) * PAGE_SIZE, before, now));
    }
    memory.change(SEVEN, &arrived(changes)).unwrap();
    for (index, now) in now.iter().enumerate() {
        assert!(kept(&memory, index) == now, "page {index}");
    }
}

#[test]
fn changes_of_pages_that_are_not_kept_are_refused_and_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let before = [[1; PAGE], [2; PAGE]];
    let mut memory = arriving(&folder, &before);
    let changes = |address, previous: &Page| {
        let mut changes = Changes::default();
        for (address, previous) in [(0x1000, &before[0]), (address, previous)] {
            let mut now = *previous;
            now[0] = 77;
            assert!(changes.add(address, previous, &now));
        }
        arrived(changes)
    };
    let missing = memory.change(SEVEN, &changes(0x3000, &before[1]));
    let source = ApplyError::Missing { vaddr: 0x3000 };
    assert!(matches!(missing, Err(MemoryError::Changes { owner: SEVEN, source: found }) if found == source));
    let other = memory.change(SEVEN, &changes(0x2000, &[3; PAGE]));
    assert!(matches!(other, Err(MemoryError::Changes { source: ApplyError::Digest { .. }, .. })), "{other:?}");
    assert!(matches!(
        memory.change(Owner::Process(8), &changes(0x2000, &before[1])),
        Err(MemoryError::Unannounced { .. })
    ));
    assert!((0..2).all(|index| kept(&memory, index) == before[index]));
}

fn digests(pages: &[Page]) -> Vec<u8> {
    pages.iter().flat_map(|page| podferry_memory::digest::of_page(page)).collect()
}

/// Compares digests of these pages with what arrived, of which the list has the same pages.
fn compared(memory: &mut ArrivingMemory, pages: &[Page]) -> Result<(), MemoryError> {
    memory.take_list(ListOf::Existing(SEVEN), &list(&[(0x1000, (pages.len() as u64 + 1) * PAGE_SIZE)]))?;
    let mut comparison = memory.open_digests(SEVEN)?;
    digests(pages).chunks(16).try_for_each(|digests| memory.compare(SEVEN, &mut comparison, digests))?;
    verdict(SEVEN, comparison)
}

#[test]
fn what_arrived_is_what_the_source_has_or_the_first_difference_is_named() {
    let pages = [[1; PAGE], [0; PAGE], [3; PAGE], [0; PAGE]];
    for (index, changed) in pages.iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        compared(&mut arriving(&folder, &pages), &pages).unwrap();
        let mut now = pages;
        now[index][PAGE - 1] = changed[0] + 1;
        let different = compared(&mut arriving(&folder, &pages), &now).unwrap_err();
        let address = (index as u64 + 1) * PAGE_SIZE;
        assert_eq!(
            different.to_string(),
            format!(
                "memory of process 7 (by its number inside the container) is not what it is on the source: 1 of 4 pages differ, the \
                 first at {address:#x}-{:#x}",
                address + PAGE_SIZE
            )
        );
    }
}

#[test]
fn pages_that_stay_with_the_source_are_taken_in_post_copy_only_and_only_of_a_process_that_comes() {
    let folder = tempfile::tempdir().unwrap();
    let later = list(&[(0x1000, 0x2000)]);
    let mut live = arriving(&folder, &[[1; PAGE]]);
    let refused = live.take_list(ListOf::Later(7), &later);
    assert!(matches!(refused, Err(MemoryError::NotPostCopy { process: 7 })), "{refused:?}");
    let mut memory = ArrivingMemory { post_copy: true, ..arriving(&folder, &[[1; PAGE]]) };
    memory.take_list(ListOf::Later(7), &later).unwrap();
    let nobodys = memory.complete();
    assert!(matches!(nobodys, Err(MemoryError::NoProcess { process: 7 })), "{nobodys:?}");
}

#[test]
fn a_container_of_which_nothing_could_come_before_the_freeze_is_criu_s_alone() {
    let folder = tempfile::tempdir().unwrap();
    let mut memory = ArrivingMemory::new(folder.path().to_owned(), false);
    memory.dumped(SEVEN, dumped(&folder, &[0, 1])).unwrap();
    memory.take_list(ListOf::Existing(SEVEN), &[]).unwrap();
    memory.complete().unwrap();
    // But not one whose pages the source has kept from CRIU.
    let mut memory = ArrivingMemory::new(folder.path().to_owned(), false);
    memory.take_list(ListOf::Existing(SEVEN), &list(&[(0x1000, 0x2000)])).unwrap();
    let without = memory.complete();
    assert!(matches!(without, Err(MemoryError::NoProcess { process: 7 })), "{without:?}");
}

#[test]
fn a_page_that_did_not_arrive_is_a_difference() {
    let folder = tempfile::tempdir().unwrap();
    let different = compared(&mut arriving(&folder, &[[1; PAGE]]), &[[1; PAGE], [0; PAGE], [0; PAGE]]).unwrap_err();
    let first = PageRange::new(0x2000, 0x4000);
    assert!(
        matches!(different, MemoryError::Different { owner: SEVEN, pages: 2, compared: 3, first: found } if found == first),
        "{different}"
    );
}

#[test]
fn a_store_that_is_changed_behind_the_agents_back_is_found_out() {
    use std::os::unix::fs::FileExt as _;
    let folder = tempfile::tempdir().unwrap();
    let pages = [[1; PAGE], [2; PAGE], [3; PAGE]];
    let mut memory = arriving(&folder, &pages);
    let store = std::fs::File::options().write(true).open(folder.path().join("memory-7.store")).unwrap();
    // The first page is the second one of its 2 MiB.
    store.write_all_at(&[9], 3 * PAGE_SIZE + 77).unwrap();
    let different = compared(&mut memory, &pages).unwrap_err();
    let first = PageRange::new(0x3000, 0x4000);
    assert!(
        matches!(different, MemoryError::Different { pages: 1, first: found, .. } if found == first),
        "{different}"
    );
}

#[test]
fn digests_out_of_place_are_refused_and_so_is_memory_behind_them() {
    let folder = tempfile::tempdir().unwrap();
    let pages = [[1; PAGE], [2; PAGE]];
    let mut memory = arriving(&folder, &pages);
    assert!(matches!(memory.open_digests(SEVEN), Err(MemoryError::Digests { owner: SEVEN, .. })), "before the list");
    memory.take_list(ListOf::Existing(Owner::Process(8)), &list(&[(0x1000, 0x2000)])).unwrap();
    assert!(
        matches!(memory.open_digests(Owner::Process(8)), Err(MemoryError::Digests { owner: Owner::Process(8), .. })),
        "without memory"
    );
    memory.take_list(ListOf::Existing(SEVEN), &list(&[(0x1000, 0x3000)])).unwrap();
    let mut comparison = memory.open_digests(SEVEN).unwrap();
    assert!(matches!(memory.open_digests(SEVEN), Err(MemoryError::Digests { owner: SEVEN, .. })), "a second time");
    for bytes in [vec![0; 12], vec![0; 24], vec![0; 1 << 20]] {
        let refused = memory.compare(SEVEN, &mut Comparison::of(memory.existing[&SEVEN].clone()), &bytes);
        assert!(matches!(refused, Err(MemoryError::NoDigests { owner: SEVEN, .. })), "{} bytes", bytes.len());
    }
    memory.compare(SEVEN, &mut comparison, &digests(&pages[..1])).unwrap();
    let (zero, bytes) = (ZeroMap::default(), vec![1; PAGE].into());
    let late = PageRun { object: 9, vaddr: 0x1000, count: 1, flags: 0, zero, bytes, absent: false };
    assert!(matches!(memory.keep(SEVEN, &late), Err(MemoryError::Late { owner: SEVEN })));
    let mut changes = Changes::default();
    assert!(changes.add(0x1000, &pages[0], &{
        let mut now = pages[0];
        now[5] = 5;
        now
    }));
    assert!(matches!(memory.change(SEVEN, &arrived(changes)), Err(MemoryError::Late { owner: SEVEN })));
    assert!(matches!(
        verdict(SEVEN, comparison),
        Err(MemoryError::NoDigests { owner: SEVEN, source: DigestError::TooFew(1) })
    ));
}

const SEGMENT: Owner = Owner::SharedMemory(4711);

/// The images of the segment as CRIU dumped it: these pages of the byte 9, and whatever else, nothing.
fn dumped(folder: &tempfile::TempDir, pages: &[u64]) -> PageSetWriter {
    let owner = podferry_criu::Owner::SharedMemory(4711);
    let mut images = PageSetWriter::create(folder.path(), owner, 3).unwrap();
    for page in pages {
        let run = Run { address: page * PAGE_SIZE, pages: 1, flags: podferry_criu::page_flags::PRESENT };
        images.add(run, |_| false, &[9; PAGE]).unwrap();
    }
    images
}

/// Shared memory that has these pages, from its beginning on.
fn arriving_segment(folder: &tempfile::TempDir, pages: &[Page]) -> ArrivingMemory {
    let mut memory = ArrivingMemory::new(folder.path().to_owned(), false);
    memory.open(SEGMENT).unwrap();
    let (bytes, count) = (pages.concat().into(), pages.len() as u64);
    let run = PageRun { object: 1, vaddr: 0, count, flags: 0, zero: ZeroMap::default(), bytes, absent: false };
    memory.keep(SEGMENT, &run).unwrap();
    memory
}

fn existing(memory: &mut ArrivingMemory, ranges: &[(u64, u64)]) {
    memory.take_list(ListOf::Existing(SEGMENT), &list(ranges)).unwrap();
}

#[test]
fn shared_memory_that_criu_restores_is_left_for_it_and_what_criu_has_is_taken_from_there() {
    let folder = tempfile::tempdir().unwrap();
    let mut memory = arriving_segment(&folder, &[[1; PAGE], [2; PAGE], [3; PAGE]]);
    assert!(!memory.is_there(), "the pager has nothing to do with it");
    existing(&mut memory, &[(0, 0x2000), (0x7000, 0x8000)]);
    memory.dumped(SEGMENT, dumped(&folder, &[1, 7])).unwrap();
    memory.complete().unwrap();
    assert_eq!(laying::not_laid(folder.path()).unwrap(), [4711]);
    let index = std::fs::read_to_string(laying::index(folder.path())).unwrap();
    assert!(index.ends_with("shared-4711.store\n0 0 1000\n"), "{index}");
}

#[test]
fn shared_memory_of_which_a_page_did_not_come_is_not_restored() {
    let folder = tempfile::tempdir().unwrap();
    let mut memory = arriving_segment(&folder, &[[1; PAGE]]);
    existing(&mut memory, &[(0, 0x2000)]);
    memory.dumped(SEGMENT, dumped(&folder, &[])).unwrap();
    let missing = memory.complete();
    assert!(matches!(missing, Err(MemoryError::Missing { owner: SEGMENT, .. })), "{missing:?}");
    // Of this one nothing came at all.
    let folder = tempfile::tempdir().unwrap();
    let mut memory = ArrivingMemory::new(folder.path().to_owned(), false);
    existing(&mut memory, &[(0, 0x1000)]);
    memory.dumped(SEGMENT, dumped(&folder, &[])).unwrap();
    assert!(matches!(memory.complete(), Err(MemoryError::Missing { owner: SEGMENT, .. })));
}

#[test]
fn shared_memory_that_is_gone_or_was_not_followed_is_criu_s_alone() {
    let folder = tempfile::tempdir().unwrap();
    // Nobody has it any more.
    let mut memory = arriving_segment(&folder, &[[1; PAGE]]);
    existing(&mut memory, &[(0, 0x1000)]);
    memory.complete().unwrap();
    assert!(!laying::index(folder.path()).exists());
    // It came, and was given up: CRIU dumped all of it.
    let folder = tempfile::tempdir().unwrap();
    let mut memory = arriving_segment(&folder, &[[1; PAGE]]);
    memory.dumped(SEGMENT, dumped(&folder, &[0, 1])).unwrap();
    memory.complete().unwrap();
    assert!(!laying::index(folder.path()).exists());
}

#[test]
fn shared_memory_with_a_number_that_criu_gives_none_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut memory = ArrivingMemory::new(folder.path().to_owned(), false);
    assert!(matches!(memory.open(Owner::SharedMemory(1 << 32)), Err(MemoryError::Number(_))));
}

proptest! {
    #[test]
    fn noise_is_no_list_or_a_list_that_ascends(noise in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(ranges) = parse(&noise) {
            prop_assert!(ranges.as_slice().windows(2).all(|two| two[0].end < two[1].start));
        }
    }
}
