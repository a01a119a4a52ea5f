//! A process that changes its memory in every way there is, and checks it, moved again and again.

use std::fs;
use std::time::Duration;

use podferry_local::{FIRST_CONTAINER_ADDRESS, Workload};
use serde_json::Value;

use super::{NODES, Stage, eventually, image};

/// Clock ticks that a process has had, proc(5).
fn ticks(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = text.rsplit_once(") ").map(|(_, fields)| fields).unwrap_or_default();
    fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum()
}

/// Moves it so often, with these words for the command line, and looks at each record. It writes to tens of MiB, maps, unmaps, moves
/// and forks all the time, and ends when a byte is not what it wrote.
pub(crate) fn hop(hops: usize, words: &[&str], judge: impl Fn(usize, &Value)) {
    let stage = Stage::up(&["churn"]);
    let arguments = ["/bin/podferry-memory-churn", "/tmp/sign", "1", "1", "--fork"];
    stage.start(&Workload::new(
        "churn",
        image(stage.folder.path(), "churn", "podferry-memory-churn", &[]),
        arguments,
        FIRST_CONTAINER_ADDRESS,
    ));
    for hop in 1..=hops {
        let target = NODES[hop % 2];
        let record = stage.migrate_with("churn", target, words);
        judge(hop, &record);
        let node = stage.node(target);
        let log = node.container_logs().join("churn.log");
        // Long enough for it to have looked at every page.
        let had = ticks(node.container_process("churn").unwrap().pid);
        eventually(Duration::from_secs(60), || {
            let said = fs::read_to_string(&log).unwrap_or_default();
            let process =
                node.container_process("churn").unwrap_or_else(|_| panic!("it ended after hop {hop}: {said}"));
            let now = ticks(process.pid);
            if now > had + 100 { Ok(()) } else { Err(format!("it does not run on after hop {hop}: {had}, {now}")) }
        });
    }
}
