//! `runc checkpoint`, a copy, `runc restore`: what whoever has runc and no podferry does, with connections kept.

use podferry_local::RUNC_ROOT;

use super::way::{Tool, Way, images, path};
use crate::error::Result;

pub(super) struct Runc;

impl Tool for Runc {
    fn checkpoint(&mut self, way: &Way) -> Result<()> {
        let images = path(&images(way.source));
        let words = ["checkpoint", "--image-path", &images, "--work-path", "/tmp", "--tcp-established", way.name];
        way.source.runc(&words)?.success()?;
        Ok(())
    }

    fn restore(&mut self, way: &Way) -> Result<()> {
        let (images, bundle) = (path(&images(way.target)), path(&way.target.bundle(way.name)));
        let mut command = way.target.command("runc");
        command.args(["--root", RUNC_ROOT, "restore", "--detach", "--tcp-established", "--work-path", "/tmp"]);
        command.args(["--image-path", &images, "--bundle", &bundle, way.name]);
        way.run_on_target(command)
    }
}
