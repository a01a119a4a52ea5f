//! What the container's large files hold goes to the target in the rounds, too, as seeds of its writable layer and of its volumes.
//!
//! A round goes over the files first and then over memory: what memory is written meanwhile is then sent once, in that round. The first
//! round sends all large files and lasts as long as that takes, so nothing is decided before; a later one reads what is not at rest.
//! In the freeze comes a last pass, beside CRIU's dump: nobody writes any more, and what the seeds hold then is what the layer says of
//! its files. Convergence counts 4 KiB of files as a page: what of them is written in a round has to be sent in
//! the next one, or in the freeze, like memory. What reading them will take then is part of what a freeze is predicted to take.

use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::time::Duration;

use podferry_filesystem::{Host, Pass, Seeder, SeedsSent};
use podferry_memory::writers;
use podferry_transfer::Object;

use super::{SendError, Way};
use crate::source::pages::LayerOut;
use crate::volumes::MovedFiles;

/// What the target has of the files.
#[derive(Debug, Default)]
pub(in crate::source) struct Seeds {
    /// One for each that moves, in their order.
    seeders: Vec<Seeder>,
    round: u32,
    /// What the last pass was like.
    last: SeedsSent,
}

impl Seeds {
    /// Sends what is new in a running container's files. Blocks.
    ///
    /// # Errors
    /// When a directory is not found, or the transfer breaks.
    pub(in crate::source) fn round(&mut self, files: &MovedFiles, way: &Way) -> Result<SeedsSent, SendError> {
        self.pass(files, way, Pass::Running)
    }

    /// Sends what is new since the last round, if there was one. The container must stand still. Blocks.
    ///
    /// # Errors
    /// When a directory is not found, or the transfer breaks.
    pub(in crate::source) fn last_round(&mut self, files: &MovedFiles, way: &Way) -> Result<SeedsSent, SendError> {
        if self.round == 0 {
            return Ok(SeedsSent::default());
        }
        self.pass(files, way, Pass::Frozen)
    }

    /// What files add to a freeze that have to be read then, however little of them is written: as much as it took in the last pass.
    pub(super) fn cost(&self) -> Duration {
        let SeedsSent { read_bytes, read_time, restless_bytes, .. } = self.last;
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let part = restless_bytes.min(read_bytes) as f64 / read_bytes.max(1) as f64;
        read_time.mul_f64(part)
    }

    /// For what refers to them, in the order of the files.
    pub(in crate::source) fn into_seeders(self) -> impl Iterator<Item = Seeder> {
        self.seeders.into_iter().chain(std::iter::repeat_with(Seeder::default))
    }

    fn pass(&mut self, files: &MovedFiles, way: &Way, pass: Pass) -> Result<SeedsSent, SendError> {
        self.round += 1;
        self.seeders.resize_with(files.iter().len(), Seeder::default);
        self.last = SeedsSent::default();
        for ((name, layer), seeder) in files.iter().zip(&mut self.seeders) {
            let object = Object::Seeds { layer: name.to_owned(), round: self.round };
            let mut out = SeedsOut { way, object, open: None };
            let sent = seeder.pass(layer, pass, &Watch(way), &mut out)?;
            out.close()?;
            self.last += sent;
            tracing::debug!(round = self.round, ?pass, name, ?sent, "a pass over files");
        }
        Ok(self.last)
    }
}

/// What a pass has to know of the migration and the machine.
struct Watch<'a>(&'a Way);

impl Host for Watch<'_> {
    fn is_cancelled(&self) -> bool {
        self.0.cancelled.is_cancelled()
    }

    fn has_no_writer(&self, file: BorrowedFd<'_>) -> bool {
        writers::has_none(file)
    }
}

/// An object that is opened when there is something to write into it.
struct SeedsOut<'a> {
    way: &'a Way,
    object: Object,
    open: Option<LayerOut>,
}

impl SeedsOut<'_> {
    fn close(self) -> Result<(), SendError> {
        self.open.map_or(Ok(()), LayerOut::close).map_err(podferry_filesystem::Error::Stream)?;
        Ok(())
    }
}

impl Write for SeedsOut<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.way.rest();
        if let Some(open) = &mut self.open {
            return open.write(bytes);
        }
        let (writer, _) = self.way.open(&self.object).map_err(io::Error::other)?;
        self.open.insert(LayerOut::new(writer, self.way.cancelled.clone())).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.open.as_mut().map_or(Ok(()), LayerOut::flush)
    }
}
