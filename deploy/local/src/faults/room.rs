//! File systems of a node that are full.

use std::path::Path;

use crate::error::Result;
use crate::node::Node;

/// A mount on a node that goes when it is dropped: the node may be asked for its processes then.
#[derive(Debug)]
pub struct Mounted {
    node: Node,
    point: Option<String>,
}

impl Mounted {
    /// Mounts something, in mount's words, on a point.
    pub fn new(node: &Node, what: &str, point: &Path) -> Result<Self> {
        let point = point.display().to_string();
        node.shell(&format!("mount {what} {point}"))?;
        Ok(Self { node: node.clone(), point: Some(point) })
    }

    /// Takes it away.
    pub fn end(mut self) -> Result<()> {
        self.undo()
    }

    fn undo(&mut self) -> Result<()> {
        let Some(point) = self.point.take() else { return Ok(()) };
        self.node.shell(&format!("umount {point}")).map(drop)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // What cannot be undone goes with the node.
        let _ = self.undo();
    }
}

/// A full disk where a node's agent keeps its state: everything that was there is, and no byte more fits.
pub fn full_state(node: &Node) -> Result<Mounted> {
    let (state, kept) = (node.agent_state(), node.folder().join("kept-state"));
    node.shell(&format!("rm -rf {kept} && cp -a {} {kept}", state.display(), kept = kept.display()))?;
    let used = node.shell(&format!("du -sk {}", state.display()))?;
    let used = used.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0);
    let tiny = Mounted::new(node, &format!("-t tmpfs -o size={}k tmpfs", used + 64), &state)?;
    node.shell(&format!(
        "cp -a {}/. {state} && dd if=/dev/zero of={state}/filler bs=4k 2>/dev/null || test -s {state}/filler",
        kept.display(),
        state = state.display()
    ))?;
    Ok(tiny)
}

/// The tmpfs of a node's images has so little room that no workload fits, until this is dropped.
#[derive(Debug)]
pub struct NoRoomForImages(Node);

impl NoRoomForImages {
    /// Makes it small.
    pub fn new(node: &Node) -> Result<Self> {
        resize(node, "2m")?;
        Ok(Self(node.clone()))
    }
}

impl Drop for NoRoomForImages {
    fn drop(&mut self) {
        // As above.
        let _ = resize(&self.0, "50%");
    }
}

fn resize(node: &Node, size: &str) -> Result<()> {
    node.shell(&format!("mount -o remount,size={size} {}", node.images().display())).map(drop)
}
