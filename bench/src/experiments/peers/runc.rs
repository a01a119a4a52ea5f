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
        let words = ["--root", RUNC_ROOT, "restore", "--detach", "--tcp-established", "--work-path", "/tmp"];
        let of_it = ["--image-path", &images, "--bundle", &bundle, way.name];
        let words: Vec<String> = words.into_iter().chain(of_it).map(str::to_owned).collect();
        way.run_on_target("", "runc", &words)
    }
}
