//! What a transfer is made of: image files, layers, memory pages.

use std::fmt;

use podferry_proto::v1::{
    DigestsObject, ExistingObject, LaterObject, MemoryObject, PagesObject, SeedsObject, TransferOpen, digests_object,
    existing_object, memory_object, pages_object, transfer_open,
};
use thiserror::Error;

use crate::limits::MAX_NAME_LENGTH;

/// Whose memory pages are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Owner {
    /// Of a process: its id inside the container.
    Process(u32),
    /// Of a shared memory segment: CRIU's id of it.
    SharedMemory(u64),
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(pid) => write!(f, "process {pid}"),
            Self::SharedMemory(segment) => write!(f, "shared memory {segment}"),
        }
    }
}

/// One thing that is sent.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Object {
    /// A file of the checkpoint image, by its name.
    ImageFile(String),
    /// The archive of a layer, by its name.
    Layer(String),
    /// The memory pages of one owner.
    Pages {
        /// Whose they are.
        owner: Owner,
        /// CRIU's pages id: the number in `pages-<id>.img`.
        id: u32,
    },
    /// Memory pages of a container that runs; a page that comes again replaces the earlier one. Those of shared memory have its offsets
    /// for addresses.
    Memory {
        /// Whose they are.
        owner: Owner,
        /// Tells this object from others of the same owner.
        round: u32,
    },
    /// Which pages of an owner's memory objects it has in the end.
    Existing {
        /// Whose they are.
        owner: Owner,
    },
    /// Which of these the source keeps for the target to fetch.
    Later {
        /// The process: its id inside the container.
        process: u32,
    },
    /// What those pages hold in the end: a digest of each.
    Digests {
        /// Whose they are.
        owner: Owner,
    },
    /// What large files of a layer hold that is still written to.
    Seeds {
        /// The layer, by its name.
        layer: String,
        /// Tells this object from others of the same layer.
        round: u32,
    },
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ImageFile(name) => write!(f, "image file {name}"),
            Self::Layer(name) => write!(f, "layer {name}"),
            Self::Pages { owner, id } => write!(f, "pages {id} of {owner}"),
            Self::Memory { owner, round } => write!(f, "memory of {owner}, round {round}"),
            Self::Existing { owner } => write!(f, "list of the existing pages of {owner}"),
            Self::Later { process } => write!(f, "list of the pages of process {process} that come later"),
            Self::Digests { owner } => write!(f, "digests of the pages of {owner}"),
            Self::Seeds { layer, round } => write!(f, "seeds of layer {layer}, round {round}"),
        }
    }
}

/// Why an object cannot be sent or taken.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum InvalidObject {
    /// The name could lead out of its folder, hide, or trouble a file system.
    #[error(
        "{name:?} is no name of an image file or layer: 1 to {MAX_NAME_LENGTH} of A-Z a-z 0-9 . _ - and no dot in front"
    )]
    Name {
        /// Its first characters.
        name: String,
    },
    /// The message says nothing, or something that this version does not know.
    #[error("an object of an unknown kind; update the older of the two nodes")]
    Unknown,
}

impl Object {
    /// Whether it is made of pages, and not of bytes one after the other.
    pub fn has_pages(&self) -> bool {
        matches!(self, Self::Pages { .. } | Self::Memory { .. })
    }

    /// Checks the name, if it has one.
    pub fn check(&self) -> Result<(), InvalidObject> {
        match self {
            Self::ImageFile(name) | Self::Layer(name) | Self::Seeds { layer: name, .. } => check_name(name),
            Self::Pages { .. }
            | Self::Memory { .. }
            | Self::Existing { .. }
            | Self::Later { .. }
            | Self::Digests { .. } => Ok(()),
        }
    }
}

fn check_name(name: &str) -> Result<(), InvalidObject> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let fits = !name.is_empty() && name.len() <= MAX_NAME_LENGTH;
    if fits && !name.starts_with('.') && name.bytes().all(plain) {
        return Ok(());
    }
    Err(InvalidObject::Name { name: name.chars().take(MAX_NAME_LENGTH).collect() })
}

/// Each kind of object has its owner in a message of its own, and all are alike.
macro_rules! owners {
    ($($of:ident),*) => {$(
        impl From<Owner> for $of::Owner {
            fn from(owner: Owner) -> Self {
                match owner {
                    Owner::Process(pid) => Self::Process(pid),
                    Owner::SharedMemory(segment) => Self::SharedMemory(segment),
                }
            }
        }

        impl From<$of::Owner> for Owner {
            fn from(owner: $of::Owner) -> Self {
                match owner {
                    $of::Owner::Process(pid) => Self::Process(pid),
                    $of::Owner::SharedMemory(segment) => Self::SharedMemory(segment),
                }
            }
        }
    )*};
}

owners!(pages_object, memory_object, existing_object, digests_object);

fn named(owner: Option<impl Into<Owner>>) -> Result<Owner, InvalidObject> {
    owner.map(Into::into).ok_or(InvalidObject::Unknown)
}

impl From<&Object> for TransferOpen {
    fn from(object: &Object) -> Self {
        let object = match object {
            Object::ImageFile(name) => transfer_open::Object::ImageFile(name.clone()),
            Object::Layer(name) => transfer_open::Object::Layer(name.clone()),
            Object::Pages { owner, id } => {
                transfer_open::Object::Pages(PagesObject { owner: Some((*owner).into()), id: *id })
            }
            Object::Memory { owner, round } => {
                transfer_open::Object::Memory(MemoryObject { owner: Some((*owner).into()), round: *round })
            }
            Object::Existing { owner } => {
                transfer_open::Object::Existing(ExistingObject { owner: Some((*owner).into()) })
            }
            Object::Later { process } => transfer_open::Object::Later(LaterObject { process: *process }),
            Object::Digests { owner } => transfer_open::Object::Digests(DigestsObject { owner: Some((*owner).into()) }),
            Object::Seeds { layer, round } => {
                transfer_open::Object::Seeds(SeedsObject { layer: layer.clone(), round: *round })
            }
        };
        Self { object: Some(object) }
    }
}

impl TryFrom<TransferOpen> for Object {
    type Error = InvalidObject;

    fn try_from(message: TransferOpen) -> Result<Self, InvalidObject> {
        let object = match message.object.ok_or(InvalidObject::Unknown)? {
            transfer_open::Object::ImageFile(name) => Self::ImageFile(name),
            transfer_open::Object::Layer(name) => Self::Layer(name),
            transfer_open::Object::Pages(PagesObject { owner, id }) => Self::Pages { owner: named(owner)?, id },
            transfer_open::Object::Memory(MemoryObject { owner, round }) => {
                Self::Memory { owner: named(owner)?, round }
            }
            transfer_open::Object::Existing(ExistingObject { owner }) => Self::Existing { owner: named(owner)? },
            transfer_open::Object::Later(LaterObject { process }) => Self::Later { process },
            transfer_open::Object::Digests(DigestsObject { owner }) => Self::Digests { owner: named(owner)? },
            transfer_open::Object::Seeds(SeedsObject { layer, round }) => Self::Seeds { layer, round },
        };
        object.check()?;
        Ok(object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_the_folder_are_refused() {
        let long = "x".repeat(MAX_NAME_LENGTH + 1);
        for name in ["", ".", "..", ".hidden", "a/b", "/etc/passwd", "a\0b", "a b", "ä", "-\n", &long] {
            let seeds = Object::Seeds { layer: name.to_owned(), round: 1 };
            for object in [Object::ImageFile(name.to_owned()), Object::Layer(name.to_owned()), seeds] {
                assert!(Object::try_from(TransferOpen::from(&object)).is_err(), "{name:?}");
            }
        }
    }

    #[test]
    fn every_object_survives_the_wire() {
        for object in [
            Object::ImageFile("pagemap-1.img".to_owned()),
            Object::Layer("x".repeat(MAX_NAME_LENGTH)),
            Object::Pages { owner: Owner::Process(0), id: 0 },
            Object::Pages { owner: Owner::SharedMemory(u64::MAX), id: u32::MAX },
            Object::Memory { owner: Owner::Process(1), round: 0 },
            Object::Memory { owner: Owner::SharedMemory(0), round: u32::MAX },
            Object::Existing { owner: Owner::Process(u32::MAX) },
            Object::Existing { owner: Owner::SharedMemory(7) },
            Object::Later { process: u32::MAX },
            Object::Digests { owner: Owner::Process(7) },
            Object::Digests { owner: Owner::SharedMemory(7) },
            Object::Seeds { layer: "upper".to_owned(), round: u32::MAX },
        ] {
            assert_eq!(Object::try_from(TransferOpen::from(&object)), Ok(object));
        }
    }
}
