//! What CRIU wrote of threads that is needed before anybody restores them.

use std::fs;
use std::path::Path;

use protobuf::rt::WireType;
use protobuf::{CodedInputStream, Error};

use crate::CriuError;

/// `IMG_COMMON_MAGIC` and `CORE_MAGIC` of `criu/include/magic.h`.
const CORE_MAGIC: [u32; 2] = [0x5456_4319, 0x5505_3847];
/// `thread_core` of a `core_entry`, and `rseq_entry` of that, in `core.proto`.
const THREAD_CORE: u32 = 5;
const RSEQ_ENTRY: u32 = 15;
/// `rseq_abi_pointer` and `rseq_abi_size` in `rseq.proto`.
const ADDRESS: u32 = 1;
const SIZE: u32 = 2;

/// An area of a thread's memory that the kernel writes to by itself (rseq(2)): where the thread runs, whenever it returns to its own
/// code, and also to CRIU's while it is dumped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RseqArea {
    /// Its first address.
    pub address: u64,
    /// Its bytes, at least 1.
    pub size: u64,
}

/// The areas of all threads that a complete dump in this folder has, in no order. Whose they are is not said.
///
/// # Errors
/// When the folder or an image of a thread cannot be read.
pub fn rseq_areas(images: &Path) -> Result<Vec<RseqArea>, CriuError> {
    let failed = |source| CriuError::ReadImage { path: images.to_owned(), source };
    let mut areas = Vec::new();
    for entry in fs::read_dir(images).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if is_core(&path) {
            let bytes = fs::read(&path).map_err(|source| CriuError::ReadImage { path: path.clone(), source })?;
            let message = message(&bytes).ok_or_else(|| CriuError::NoImage { path: path.clone() })?;
            areas.extend(area(message).map_err(|_| CriuError::NoImage { path })?);
        }
    }
    Ok(areas)
}

fn is_core(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.strip_prefix("core-").is_some_and(|rest| rest.strip_suffix(".img").is_some())
}

/// The message of an image that has one.
fn message(image: &[u8]) -> Option<&[u8]> {
    let (magic, rest) = image.split_first_chunk::<8>()?;
    let (length, message) = rest.split_first_chunk::<4>()?;
    let is_core = magic[..] == CORE_MAGIC.map(u32::to_le_bytes).concat();
    (is_core && u32::from_le_bytes(*length) as usize == message.len()).then_some(message)
}

/// The area of a thread. None when it has not registered one, which CRIU writes as an area at 0.
fn area(core: &[u8]) -> Result<Option<RseqArea>, Error> {
    let thread = fields(core)?.submessage(THREAD_CORE);
    let entry = thread.map(|thread| fields(&thread)).transpose()?.and_then(|thread| thread.submessage(RSEQ_ENTRY));
    let Some(entry) = entry.map(|entry| fields(&entry)).transpose()? else { return Ok(None) };
    let (address, size) = (entry.number(ADDRESS), entry.number(SIZE));
    Ok((address > 0 && size > 0 && address.checked_add(size).is_some()).then_some(RseqArea { address, size }))
}

/// The fields of a message that are of use here.
#[derive(Default)]
struct Fields {
    numbers: Vec<(u32, u64)>,
    submessages: Vec<(u32, Vec<u8>)>,
}

impl Fields {
    /// A number; 0 when it is not there.
    fn number(&self, field: u32) -> u64 {
        self.numbers.iter().rfind(|(number, _)| *number == field).map_or(0, |(_, value)| *value)
    }

    fn submessage(self, field: u32) -> Option<Vec<u8>> {
        self.submessages.into_iter().rfind(|(number, _)| *number == field).map(|(_, message)| message)
    }
}

fn fields(message: &[u8]) -> Result<Fields, Error> {
    let mut input = CodedInputStream::from_bytes(message);
    let mut fields = Fields::default();
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        let field = tag >> 3;
        match WireType::new(tag & 7) {
            Some(WireType::Varint) => fields.numbers.push((field, input.read_raw_varint64()?)),
            Some(WireType::LengthDelimited) => fields.submessages.push((field, input.read_bytes()?)),
            Some(other) => input.skip_field(other)?,
            None => return Err(std::io::Error::from(std::io::ErrorKind::InvalidData).into()),
        }
    }
    Ok(fields)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn varint(mut value: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        while value > 0x7f {
            bytes.push(value.to_le_bytes()[0] | 0x80);
            value >>= 7;
        }
        bytes.push(value.to_le_bytes()[0]);
        bytes
    }

    fn sub(field: u64, message: &[u8]) -> Vec<u8> {
        [varint(field << 3 | 2), varint(message.len() as u64), message.to_vec()].concat()
    }

    fn number(field: u64, value: u64) -> Vec<u8> {
        [varint(field << 3), varint(value)].concat()
    }

    /// As CRIU writes it, with a field before and one behind.
    fn image(address: u64) -> Vec<u8> {
        let entry = [number(1, address), number(2, 32), number(3, 0x5305_3053)].concat();
        let thread = [number(1, 0), number(2, 0), sub(13, b"redis"), sub(15, &entry), number(16, 1)].concat();
        let core = [number(1, 1), sub(2, &number(1, 1 << 63)), sub(5, &thread)].concat();
        let length = u32::try_from(core.len()).unwrap().to_le_bytes();
        [&CORE_MAGIC.map(u32::to_le_bytes).concat()[..], &length, &core].concat()
    }

    #[test]
    fn the_areas_of_all_threads_are_found_and_other_images_are_not_looked_at() {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in [
            ("core-1.img", image(0x7f00_1234_5fe0)),
            ("core-22.img", image(0x7f00_1234_6fe0)),
            ("core-3.img", image(0)),
            ("mm-1.img", vec![1, 2, 3]),
        ] {
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        let mut found: Vec<_> = rseq_areas(folder.path()).unwrap();
        found.sort_by_key(|area| area.address);
        assert_eq!(found, [0x7f00_1234_5fe0, 0x7f00_1234_6fe0].map(|address| RseqArea { address, size: 32 }));
        fs::write(folder.path().join("core-4.img"), &image(0x1000)[..40]).unwrap();
        let broken = rseq_areas(folder.path()).unwrap_err();
        assert!(broken.to_string().contains("core-4.img"), "{broken}");
    }

    proptest! {
        #[test]
        fn noise_is_refused_or_names_an_area(noise in prop::collection::vec(any::<u8>(), 0..60)) {
            for bytes in [noise.clone(), sub(5, &noise), sub(5, &sub(15, &noise))] {
                if let Ok(Some(area)) = area(&bytes) {
                    prop_assert!(area.size > 0 && area.address.checked_add(area.size).is_some());
                }
            }
            prop_assert!(message(&noise).is_none());
        }
    }
}
