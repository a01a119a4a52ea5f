//! One case: the migration, the fault, and what is to hold afterwards.

use std::{
    fs,
    io::{Seek as _, SeekFrom, Write as _},
    time::{Duration, Instant},
};

use podferry_common::identity::{IdentityFiles, Peer};
use podferry_local::{
    Node, ProcessId,
    faults::{
        Halted, Moment, NODES, PATIENCE, Stopped, Victim,
        client::Trouble,
        journal,
        links::{self, Cut, Slow},
        processes,
        room::{Mounted, NoRoomForImages, full_state},
    },
};
use serde_json::Value;

use super::{
    case::{Case, Fault},
    report::{Outcome, Problem},
    theatre::{DEADLINES, ENDS_AT_ONCE, IS_REFUSED, NAME, RECOVER, Theatre},
};
use crate::{
    error::{Error, Result},
    stage::Interrupt,
};

/// How often a moment is aimed at that has passed before it could be stopped.
const AIMS: usize = 4;
/// How long a migration may take to end when all is well again.
const END: Duration = Duration::from_secs(90);
/// Between two looks at a migration.
const LOOK: Duration = Duration::from_millis(150);
/// Agents and the coordinator look at their certificates every 10 s.
const CERTIFICATE: Duration = Duration::from_secs(14);
/// What a memory limit that is too low allows, in bytes.
const LITTLE_MEMORY: i64 = 4 << 20;

/// What undoes a fault, in the order in which it was made.
enum Undo {
    Cut(Cut),
    Slow(Slow),
    Images(NoRoomForImages),
    Mounted(Mounted),
    Mark(Node, &'static str),
    StartAgain(Victim),
    Limit(Node),
}

/// Plays a case. An error is of the means, and no verdict: the theatre is of no use then.
pub(super) fn play(theatre: &mut Theatre, case: Case, interrupt: &Interrupt) -> Result<Outcome> {
    let begun = Instant::now();
    let doubles = theatre.sampler.doubles().len();
    let source_at = theatre.at;
    let record = match case.fault {
        Fault::Expired(victim) => expired(theatre, victim, interrupt)?,
        Fault::SlowLink | Fault::LittleMemory => from_the_beginning(theatre, case, interrupt)?,
        _ => at_moment(theatre, case, interrupt)?,
    };
    let mut outcome = Outcome::new(case, &record);
    let lost = is_loss(&record);
    if lost && case.allowed().loss {
        outcome.declared_loss = true;
        check_loss(theatre, &mut outcome)?;
    } else {
        check_survival(theatre, case, &mut outcome)?;
    }
    check_record(theatre, case, &record, source_at, &mut outcome);
    let seen = theatre.sampler.doubles();
    if seen.len() > doubles {
        outcome.problems.push(Problem::TwoCopies(seen[doubles..].join("; ")));
    }
    outcome.seconds = begun.elapsed().as_secs_f64();
    Ok(outcome)
}

fn text<'a>(record: &'a Value, key: &str) -> &'a str {
    record[key].as_str().unwrap_or_default()
}

/// The target's agent has said that memory is gone for good: no other failure asks for that.
fn is_loss(record: &Value) -> bool {
    text(record, "phase") == "failed" && text(record, "reason").contains("start the workload anew")
}

fn at_moment(theatre: &mut Theatre, case: Case, interrupt: &Interrupt) -> Result<Value> {
    let (slow, halted) = halt(theatre, case.moment, interrupt)?;
    let held = hold_time(case);
    // Whoever is to stand still must not go on for an instant when the others do.
    let victims = if let Fault::Stall(victim) = case.fault { theatre.scene().processes_of(victim)? } else { vec![] };
    if matches!(case.fault, Fault::Stall(_)) && victims.is_empty() {
        return Err(Error::Misplaced(format!("{case}: there is nobody to be stopped")));
    }
    let stalled = Stopped::default();
    for victim in &victims {
        stalled.stop(*victim)?;
    }
    let mut undo = inject(theatre, case)?;
    let late = matches!(case.fault, Fault::Kill { late: true, .. } | Fault::Gone);
    if !late && case.moment == Moment::Fill {
        // Whoever is started finds pages that are still missing.
        undo = start_again(theatre, undo)?;
    }
    let watcher = (case.fault == Fault::BadImage).then(|| damage_when_it_comes(theatre, &halted.id)).transpose()?;
    halted.stopped.all_go_on_but(&victims);
    if !late {
        undo = start_again(theatre, undo)?;
    }
    if late || matches!(case.fault, Fault::Stall(_) | Fault::Cut(..)) {
        hold(&halted, held, interrupt)?;
    }
    let lasts = matches!(
        case.fault,
        Fault::FullImages
            | Fault::FullState
            | Fault::FullLayers
            | Fault::BrokenDump
            | Fault::BrokenRestore
            | Fault::RefusedDump
            | Fault::RefusedRestore
    );
    let early = if lasts { Some(ended(theatre, &halted.id, interrupt)?) } else { None };
    stalled.all_go_on();
    halted.stopped.all_go_on();
    heal(theatre, undo)?;
    drop(slow);
    let record = early.map_or_else(|| ended(theatre, &halted.id, interrupt), Ok)?;
    if let Some(watcher) = watcher {
        let _ = watcher.join();
    }
    if text(&record, "phase") == "succeeded" {
        theatre.at = 1 - theatre.at;
    }
    Ok(record)
}

/// Does it again for as long as the coordinator refuses to begin: a connection over a link that was cut for seconds takes as long again
/// to find out that the link is back.
fn once_all_answer<T>(
    interrupt: &Interrupt,
    mut work: impl FnMut() -> std::result::Result<T, podferry_local::Error>,
) -> Result<T> {
    let begun = Instant::now();
    loop {
        interrupt.check()?;
        match work() {
            Err(podferry_local::Error::Refused { .. }) if begun.elapsed() < PATIENCE => std::thread::sleep(8 * LOOK),
            other => return Ok(other?),
        }
    }
}

/// Migrates until the moment. The link stays slow where the moment needs it.
fn halt(theatre: &mut Theatre, moment: Moment, interrupt: &Interrupt) -> Result<(Option<Slow>, Halted)> {
    for _ in 0..AIMS {
        interrupt.check()?;
        let slow = moment.needs_slow_link().then(|| theatre.scene().slow_down()).transpose()?;
        let id = match once_all_answer(interrupt, || theatre.scene().halt_at(moment))? {
            Ok(halted) => return Ok((slow, halted)),
            Err(id) => id,
        };
        drop(slow);
        let record = ended(theatre, &id, interrupt)?;
        if text(&record, "phase") == "succeeded" {
            theatre.at = 1 - theatre.at;
        }
        if !theatre.strategy.keeps_connections() {
            theatre.reconnect()?;
        }
    }
    Err(Error::Misplaced(format!("{moment:?} always passes before it can be met")))
}

/// Past the deadline of the phase.
fn hold_time(case: Case) -> Duration {
    let phase = match case.moment {
        Moment::Preflight => "preflight",
        Moment::Prepare => "prepare",
        Moment::PreCopy => "precopy",
        Moment::Dump | Moment::Transfer | Moment::Held => "freeze",
        Moment::Sealed => "commit",
        Moment::Committed | Moment::Filled => "release",
        Moment::Released => "resume",
        Moment::Fill => "fill",
    };
    let deadline = DEADLINES.iter().find(|(name, _)| *name == phase).map_or(5, |(_, seconds)| *seconds);
    Duration::from_secs(if case.fault == Fault::Gone { RECOVER + 4 } else { deadline + 1 })
}

/// Waits, but not for longer than the migration takes.
fn hold(halted: &Halted, time: Duration, interrupt: &Interrupt) -> Result<()> {
    let begun = Instant::now();
    while begun.elapsed() < time {
        interrupt.check()?;
        if ["phase=succeeded", "phase=failed"].iter().any(|phase| halted.begun.log.find(phase).is_some()) {
            return Ok(());
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

fn ended(theatre: &Theatre, id: &str, interrupt: &Interrupt) -> Result<Value> {
    let begun = Instant::now();
    loop {
        interrupt.check()?;
        if let Some(record) = theatre.scene().outcome(id) {
            return Ok(record);
        }
        if begun.elapsed() > END {
            let now = theatre.scene().describe(id).unwrap_or_default();
            let (phase, notes) = (text(&now, "phase").to_owned(), now["notes"].to_string());
            return Err(Error::Misplaced(format!("{id} does not end: it is in {phase:?}, {notes}")));
        }
        std::thread::sleep(LOOK);
    }
}

fn inject(theatre: &Theatre, case: Case) -> Result<Vec<Undo>> {
    let scene = theatre.scene();
    let (source, target) = (scene.source()?, scene.target()?);
    let mark = |node: Node, path: &'static str| -> Result<Vec<Undo>> {
        node.shell(&format!(": >{path}"))?;
        Ok(vec![Undo::Mark(node, path)])
    };
    Ok(match case.fault {
        Fault::Kill { victim, .. } => {
            scene.kill(victim)?;
            vec![Undo::StartAgain(victim)]
        }
        Fault::Gone => {
            scene.kill(Victim::SourceAgent)?;
            vec![Undo::StartAgain(Victim::SourceAgent)]
        }
        Fault::Cut(link, way) => vec![Undo::Cut(Cut::new(&scene, link, way)?)],
        Fault::FullImages => vec![Undo::Images(NoRoomForImages::new(&target)?)],
        Fault::FullState => vec![Undo::Mounted(full_state(&target)?)],
        Fault::FullLayers => vec![Undo::Mounted(full_layers(&target)?)],
        Fault::SlowLink => vec![Undo::Slow(Slow::down(theatre.cluster(), target.name(), links::CRAWL)?)],
        Fault::LittleMemory => {
            limit_memory(&target, Some(LITTLE_MEMORY))?;
            vec![Undo::Limit(target)]
        }
        Fault::BrokenDump => mark(source, ENDS_AT_ONCE)?,
        Fault::BrokenRestore => mark(target, ENDS_AT_ONCE)?,
        Fault::RefusedDump => mark(source, IS_REFUSED)?,
        Fault::RefusedRestore => mark(target, IS_REFUSED)?,
        Fault::Stall(_) | Fault::BadImage | Fault::Expired(_) => vec![],
    })
}

/// Starts those again that are to come back, and leaves the rest to be undone.
fn start_again(theatre: &Theatre, undo: Vec<Undo>) -> Result<Vec<Undo>> {
    let mut rest = Vec::new();
    for undo in undo {
        match undo {
            Undo::StartAgain(victim) => theatre.scene().start_again(victim)?,
            other => rest.push(other),
        }
    }
    Ok(rest)
}

fn heal(theatre: &Theatre, undo: Vec<Undo>) -> Result<()> {
    for undo in undo {
        match undo {
            Undo::Cut(cut) => cut.heal()?,
            Undo::Slow(slow) => slow.up()?,
            Undo::Images(small) => drop(small),
            Undo::Mounted(mounted) => mounted.end()?,
            Undo::Mark(node, path) => drop(node.shell(&format!("rm -f {path}"))?),
            Undo::StartAgain(victim) => theatre.scene().start_again(victim)?,
            Undo::Limit(node) => limit_memory(&node, None)?,
        }
    }
    Ok(())
}

/// A disk of the size of what is on it already, where the target's bundles are.
fn full_layers(target: &Node) -> Result<Mounted> {
    let (bundle, kept) = (target.bundle(NAME), target.folder().join("kept-bundle"));
    let words = format!("rm -rf {kept} && cp -a {} {kept}", bundle.display(), kept = kept.display());
    target.shell(&words)?;
    let full = Mounted::new(target, "-t tmpfs -o size=1m tmpfs", &bundle)?;
    target.shell(&format!("cp -a {}/. {}", kept.display(), bundle.display()))?;
    Ok(full)
}

/// What the container may have on a node that it is not on.
fn limit_memory(node: &Node, bytes: Option<i64>) -> Result<()> {
    let path = node.on_machine(&node.bundle(NAME).join("config.json"));
    let file = |action| {
        let path = path.clone();
        move |source| Error::File { action, path, source }
    };
    let mut spec: Value = serde_json::from_str(&fs::read_to_string(&path).map_err(file("read"))?)?;
    match bytes {
        Some(limit) => spec["linux"]["resources"]["memory"] = serde_json::json!({ "limit": limit }),
        None => drop(spec["linux"]["resources"].as_object_mut().and_then(|all| all.remove("memory"))),
    }
    fs::write(&path, spec.to_string()).map_err(file("write"))
}

/// Damages an image as soon as it is on the target.
fn damage_when_it_comes(theatre: &Theatre, id: &str) -> Result<std::thread::JoinHandle<bool>> {
    let target = theatre.scene().target()?;
    let path = target.on_machine(&target.images().join(id).join("images/core-1.img"));
    Ok(std::thread::spawn(move || {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE / 2 {
            if fs::metadata(&path).is_ok_and(|file| file.len() > 16)
                && let Ok(mut file) = fs::File::options().write(true).open(&path)
            {
                // CRIU knows an image by its first bytes.
                return file.seek(SeekFrom::Start(0)).and_then(|_| file.write_all(&[0; 12])).is_ok();
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        false
    }))
}

fn from_the_beginning(theatre: &mut Theatre, case: Case, interrupt: &Interrupt) -> Result<Value> {
    let undo = inject(theatre, case)?;
    let (_begun, id) = once_all_answer(interrupt, || {
        let begun = theatre.scene().begin()?;
        let id = begun.id()?;
        Ok((begun, id))
    })?;
    let record = ended(theatre, &id, interrupt)?;
    heal(theatre, undo)?;
    if text(&record, "phase") == "succeeded" {
        theatre.at = 1 - theatre.at;
    }
    Ok(record)
}

/// Whose certificate it is, and where.
fn holder(theatre: &Theatre, victim: Victim) -> Result<(Peer, IdentityFiles)> {
    let agent = |node: Node| -> Result<(Peer, IdentityFiles)> {
        let name = node.name().parse().map_err(|error| Error::Misplaced(format!("{}: {error}", node.name())))?;
        Ok((Peer::Agent(name), IdentityFiles::in_folder(node.identity())))
    };
    match victim {
        Victim::SourceAgent => agent(theatre.scene().source()?),
        Victim::TargetAgent => agent(theatre.scene().target()?),
        _ => {
            Ok((Peer::Coordinator, IdentityFiles::in_folder(theatre.cluster().coordinator().folder().join("identity"))))
        }
    }
}

/// Lets a certificate end that everybody has taken for good, and asks for a migration; then there is a new one.
fn expired(theatre: &mut Theatre, victim: Victim, interrupt: &Interrupt) -> Result<Value> {
    // Or it would be replaced.
    let keeper = Stopped::default();
    let words = fs::read_to_string(theatre.cluster().folder().join("identity/keeper.pid")).unwrap_or_default();
    let pid = words.split_whitespace().next().and_then(|pid| pid.parse().ok());
    if let Some(process) = pid.and_then(ProcessId::of) {
        keeper.stop(process)?;
    }
    let (peer, files) = holder(theatre, victim)?;
    theatre.cluster().issue(&peer, CERTIFICATE, &files)?;
    pause(CERTIFICATE + Duration::from_secs(1), interrupt)?;
    let words = ["migrate", NAME, "--to", NODES[1 - theatre.at], "--wait", "--output", "json"];
    let output = theatre.cluster().podferry([&words, theatre.strategy.words()].concat())?;
    theatre.cluster().issue(&peer, Duration::from_secs(24 * 3600), &files)?;
    let last = |text: &str| text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()).next_back();
    let whole: Option<Value> = serde_json::from_str(&output.stdout).ok();
    let record = whole.filter(|record| record["phase"].is_string());
    let record = record.or_else(|| {
        // Refused before there was a migration.
        let error = last(&output.stderr).or_else(|| last(&output.stdout))?["error"].clone();
        Some(serde_json::json!({ "phase": "failed", "reason": error.to_string(), "refused": true }))
    });
    let said =
        || Error::Misplaced(format!("`podferry migrate` said {:?}", format!("{}{}", output.stdout, output.stderr)));
    let record = record.ok_or_else(said)?;
    // The next case finds everybody with a good one.
    pause(Duration::from_secs(11), interrupt)?;
    if text(&record, "phase") == "succeeded" {
        theatre.at = 1 - theatre.at;
    }
    Ok(record)
}

fn pause(time: Duration, interrupt: &Interrupt) -> Result<()> {
    let begun = Instant::now();
    while begun.elapsed() < time {
        interrupt.check()?;
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// The workload is gone, as was said: no copy runs, and nothing of it is left but what runs it anew.
fn check_loss(theatre: &Theatre, outcome: &mut Outcome) -> Result<()> {
    let begun = Instant::now();
    loop {
        let mut left = Vec::new();
        for node in theatre.cluster().nodes() {
            let images = fs::read_dir(node.on_machine(&node.images())).into_iter().flatten().count();
            let found = [
                ("processes", processes::of_container(node, NAME).len()),
                ("images", images),
                ("open parts", journal::open_parts(node).len()),
            ];
            let found = found.into_iter().filter(|(_, count)| *count > 0);
            left.extend(found.map(|(what, count)| format!("{what} of {}: 0 -> {count}", node.name())));
        }
        if left.is_empty() {
            return Ok(());
        }
        if begun.elapsed() > PATIENCE {
            outcome.problems.push(Problem::Leaks(left));
            return Ok(());
        }
        std::thread::sleep(LOOK);
    }
}

/// One copy runs, where it should be; all that was confirmed is there, its connection lives, and nothing is left.
fn check_survival(theatre: &mut Theatre, case: Case, outcome: &mut Outcome) -> Result<()> {
    let wanted = if theatre.at == 0 { [1, 0] } else { [0, 1] };
    let begun = Instant::now();
    loop {
        let copies = theatre.copies()?;
        if copies == wanted {
            break;
        }
        if begun.elapsed() > PATIENCE {
            let words = format!("{copies:?} copies run on {NODES:?}, where {wanted:?} should");
            let both = copies.iter().all(|copies| *copies > 0);
            outcome.problems.push(if both { Problem::TwoCopies(words) } else { Problem::NoCopy(words) });
            return Ok(());
        }
        std::thread::sleep(LOOK);
    }
    check_client(theatre, case, outcome)?;
    match theatre.lost_values() {
        Ok(0) => {}
        Ok(lost) => outcome.problems.push(Problem::LostWrites(format!("{lost} values are gone"))),
        Err(error) => outcome.problems.push(Problem::Connection(error.to_string())),
    }
    let begun = Instant::now();
    let left = loop {
        let left = theatre.left()?;
        if left.is_empty() || begun.elapsed() > PATIENCE {
            break left;
        }
        std::thread::sleep(LOOK);
    };
    if !left.is_empty() {
        outcome.problems.push(Problem::Leaks(left));
    }
    Ok(())
}

fn check_client(theatre: &mut Theatre, case: Case, outcome: &mut Outcome) -> Result<()> {
    let alive = theatre.counting.as_ref().map_or(Ok(()), podferry_local::faults::client::Counting::alive);
    let trouble = match alive {
        Ok(()) => return Ok(()),
        Err(Trouble::Broken(_)) if case.may_break_connections() => theatre.reconnect()?,
        Err(Trouble::Broken(words)) => {
            outcome.problems.push(Problem::Connection(words));
            theatre.reconnect()?
        }
        Err(lost @ Trouble::Lost { .. }) => {
            theatre.reconnect()?;
            Some(lost)
        }
    };
    outcome.problems.extend(trouble.map(|trouble| Problem::LostWrites(trouble.to_string())));
    Ok(())
}

fn check_record(theatre: &Theatre, case: Case, record: &Value, source_at: usize, outcome: &mut Outcome) {
    let (phase, reason) = (text(record, "phase"), text(record, "reason"));
    let mut wrong = Vec::new();
    if !case.allowed().phases.contains(&phase) {
        wrong.push(format!("it ended as {phase}, not as one of {:?}", case.allowed().phases));
    }
    if (phase == "failed") == reason.is_empty() {
        wrong.push(format!("it ended as {phase} with the reason {reason:?}"));
    }
    let words = case.reasons();
    if phase == "failed" && !words.is_empty() && !words.iter().any(|word| reason.contains(word)) {
        wrong.push(format!("none of {words:?} is in the reason"));
    }
    if record["refused"] != true {
        // Aiming again may have moved the workload before.
        let ends = [source_at, 1 - source_at].map(|at| [NODES[at], NODES[1 - at]]);
        let said = [text(record, "source"), text(record, "target")];
        let mut facts =
            vec![(text(record, "workload") == NAME, "workload"), (ends.contains(&said), "source and target")];
        facts.push((text(record, "strategy") == theatre.strategy.name(), "strategy"));
        wrong.extend(facts.into_iter().filter(|(right, _)| !right).map(|(_, what)| format!("its {what} is wrong")));
    }
    outcome.problems.extend(wrong.into_iter().map(Problem::Record));
}

#[cfg(test)]
mod tests {
    use podferry_local::{
        Strategy,
        faults::links::{Link, Way},
    };

    use super::*;

    #[test]
    fn a_fault_outlasts_the_deadline_of_its_phase() {
        let held = |moment, fault| hold_time(Case { strategy: Strategy::Postcopy, moment, fault }).as_secs();
        assert_eq!(held(Moment::Held, Fault::Cut(Link::Agents, Way::Both)), 9);
        assert_eq!(held(Moment::Fill, Fault::Stall(Victim::Coordinator)), 4);
        assert!(held(Moment::Fill, Fault::Gone) > RECOVER);
    }

    #[test]
    fn only_a_failure_that_says_so_is_a_loss() {
        let record = |phase: &str, reason: &str| serde_json::json!({ "phase": phase, "reason": reason });
        assert!(is_loss(&record(
            "failed",
            "the rest of the memory cannot be had (on node-a, in fill); what to do: start the workload anew"
        )));
        assert!(!is_loss(&record("failed", "node-b: the transfer broke")));
        assert!(!is_loss(&record("succeeded", "")));
    }
}
