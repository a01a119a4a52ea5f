//! What the container's large files hold goes to the target in the rounds, too, as seeds of its writable layer.
//!
//! A round goes over the layer first and then over memory: what memory is written meanwhile is then sent once, in that round. The first
//! round sends all large files and lasts as long as that takes, so nothing is decided before; a later one reads what is not at rest.
//! In the freeze comes a last pass, beside CRIU's dump: nobody writes any more, and what the seeds hold then is what the layer says of
//! its files. Convergence counts 4 KiB of files as a page: what of them is written in a round has to be sent in
//! the next one, or in the freeze, like memory. What reading them will take then is part of what a freeze is predicted to take.

use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use podferry_filesystem::{Host, Pass, Seeder, SeedsSent, WritableLayer};
use podferry_memory::writers;
use podferry_transfer::Object;

use super::{SendError, Way};
use crate::source::LAYER;
use crate::source::pages::LayerOut;

/// What the target has of the layer's files.
#[derive(Debug, Default)]
pub(in crate::source) struct Seeds {
    seeder: Seeder,
    round: u32,
    /// What the last pass was like.
    last: SeedsSent,
}

impl Seeds {
    /// Sends what is new in a running container's files. Blocks.
    ///
    /// # Errors
    /// When the layer is not found, or the transfer breaks.
    pub(in crate::source) fn round(&mut self, rootfs: &Path, way: &Way) -> Result<SeedsSent, SendError> {
        self.pass(rootfs, way, Pass::Running)
    }

    /// Sends what is new since the last round, if there was one. The container must stand still. Blocks.
    ///
    /// # Errors
    /// When the layer is not found, or the transfer breaks.
    pub(in crate::source) fn last_round(&mut self, rootfs: &Path, way: &Way) -> Result<SeedsSent, SendError> {
        if self.round == 0 {
            return Ok(SeedsSent::default());
        }
        self.pass(rootfs, way, Pass::Frozen)
    }

    /// What files add to a freeze that have to be read then, however little of them is written: as much as it took in the last pass.
    pub(super) fn cost(&self) -> Duration {
        let SeedsSent { read_bytes, read_time, restless_bytes, .. } = self.last;
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let part = restless_bytes.min(read_bytes) as f64 / read_bytes.max(1) as f64;
        read_time.mul_f64(part)
    }

    /// For the layer, which refers to them.
    pub(in crate::source) const fn seeder(&self) -> &Seeder {
        &self.seeder
    }

    fn pass(&mut self, rootfs: &Path, way: &Way, pass: Pass) -> Result<SeedsSent, SendError> {
        self.round += 1;
        let layer = WritableLayer::of(rootfs)?;
        let object = Object::Seeds { layer: LAYER.to_owned(), round: self.round };
        let mut out = SeedsOut { way, object, open: None };
        let sent = self.seeder.pass(&layer, pass, &Watch(way), &mut out)?;
        out.close()?;
        self.last = sent;
        tracing::debug!(round = self.round, ?pass, ?sent, "a pass over the writable layer");
        Ok(sent)
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
