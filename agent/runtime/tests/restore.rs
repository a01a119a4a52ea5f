//! Real restores: held by the hook, committed, aborted, killed.

#![allow(clippy::unwrap_used, reason = "a helper that fails has to fail its test")]

mod lab;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use lab::{Agent, COUNTER, Hook, Lab, PATIENCE, wait_for};
use podferry_runtime::{Error, Externals, RunningRestore, Status};
use rustix::process::{Pid, Signal, kill_process};

/// Long enough for a program that runs to count on.
const A_WHILE: Duration = Duration::from_millis(400);

fn wait(restore: &mut RunningRestore) -> Result<(), Error> {
    assert!(restore.wait_until(Instant::now() + PATIENCE)?, "the restore does not end");
    Ok(())
}

/// A restore that the hook holds.
struct Held {
    agent: Agent,
    restore: RunningRestore,
    hook: Hook,
    /// The container's init.
    init: i32,
}

fn held(lab: &Lab) -> Held {
    let agent = lab.agent();
    let mut restore = lab.restore(&agent);
    let mut hook = agent.accept(&mut restore);
    let init = hook.announcement("post-restore");
    Held { agent, restore, hook, init }
}

/// A container that is up to its first instruction and stays there.
fn assert_held(lab: &Lab, restore: &mut RunningRestore) {
    let before = lab.count();
    assert!(!restore.wait_until(Instant::now() + A_WHILE).unwrap(), "restore ended while held");
    assert_eq!(lab.count(), before, "the container runs while it should be held");
}

fn assert_runs(lab: &Lab) {
    let before = lab.count();
    wait_for("the restored program to go on", || lab.count() > before + 2);
}

#[test]
fn go_lets_the_container_run_with_its_stdio_and_runc_manages_it() {
    let lab = Lab::new(COUNTER);
    lab.checkpoint();
    let frozen_at = lab.count();
    let Held { mut restore, mut hook, init, agent: _agent } = held(&lab);
    assert_held(&lab, &mut restore);
    assert_eq!(lab.count(), frozen_at);
    hook.say("go");
    wait(&mut restore).unwrap();
    assert_runs(&lab);

    let container = lab.container();
    assert_eq!((container.status, container.init.unwrap().pid), (Status::Running, init));
    assert_eq!(fs::read_to_string(lab.dir.path().join("pid")).unwrap(), init.to_string());
    assert!(container.is_alive());
    let log = || fs::read_to_string(lab.log()).unwrap();
    let wanted = format!("\n{}\n", frozen_at + 3);
    wait_for("the new keeper to log", || log().contains(&wanted));
    assert!(log().starts_with("1\n2\n3\n"), "the log starts on the source");

    let output = lab.runc.exec(&lab.id, ["/bin/cat", "/etc/precious"]).unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "do not lose me");
    assert_eq!(lab.runc.state(&lab.id).unwrap().pid(), &Some(init));
    lab.runc.kill(&lab.id, "KILL").unwrap();
    wait_for("the container to end", || lab.container().status == Status::Stopped);
    lab.runc.delete(&lab.id, false).unwrap();
    lab.assert_clean();
}

#[test]
fn abort_undoes_the_restore_and_says_so() {
    let lab = Lab::new(COUNTER);
    lab.checkpoint();
    let count = lab.count();
    let Held { agent, mut restore, mut hook, init } = held(&lab);
    hook.say("abort");
    let error = wait(&mut restore).unwrap_err().to_string();
    assert!(error.contains("the agent aborts this restore"), "{error}");
    wait_for("the aborted tasks to die", || !Path::new(&format!("/proc/{init}")).exists());
    assert_eq!(lab.count(), count);
    lab.runc.cleanup_killed_restore(&lab.id, &lab.bundle()).unwrap();
    lab.assert_clean();

    // The images are untouched: a second attempt works.
    let mut restore = lab.restore(&agent);
    let mut hook = agent.accept(&mut restore);
    hook.announcement("post-restore");
    hook.say("go");
    wait(&mut restore).unwrap();
    assert_runs(&lab);
}

#[test]
fn an_agent_that_hangs_up_before_the_seal_aborts() {
    let lab = Lab::new(COUNTER);
    lab.checkpoint();
    let Held { agent, mut restore, hook, .. } = held(&lab);
    drop(hook);
    let error = wait(&mut restore).unwrap_err().to_string();
    assert!(error.contains("the agent hung up"), "{error}");

    drop(agent);
    fs::remove_file(lab.dir.path().join("hook.sock")).unwrap();
    let nobody = lab.agent();
    fs::remove_file(&nobody.path).unwrap();
    lab.runc.cleanup_killed_restore(&lab.id, &lab.bundle()).unwrap();
    let error = wait(&mut lab.restore(&nobody)).unwrap_err().to_string();
    assert!(error.contains("podferry-hook: restore is aborted: No such file"), "{error}");
}

#[test]
fn a_sealed_hook_outlives_its_agent() {
    let lab = Lab::new(COUNTER);
    lab.checkpoint();
    let Held { agent, mut restore, mut hook, init } = held(&lab);
    hook.say("seal");
    assert_eq!(hook.hear(), "sealed");
    fs::remove_file(&agent.path).unwrap();
    drop((agent, hook));
    assert_held(&lab, &mut restore);

    let agent = lab.agent();
    let mut hook = agent.accept(&mut restore);
    assert_eq!(hook.announcement("post-restore-sealed"), init);
    hook.say("seal");
    assert_eq!(hook.hear(), "sealed");
    hook.say("go");
    wait(&mut restore).unwrap();
    assert_runs(&lab);
}

/// Kills `runc restore` alone, as the out-of-memory killer might, while the hook holds the container.
fn kill_runc(lab: &Lab) -> (Hook, i32) {
    lab.checkpoint();
    let Held { mut restore, mut hook, init, agent: _agent } = held(lab);
    hook.say("seal");
    assert_eq!(hook.hear(), "sealed");
    kill_process(Pid::from_raw(restore.pid.cast_signed()).unwrap(), Signal::KILL).unwrap();
    assert!(restore.wait().is_err());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(mounts.contains("criu-root"), "the trap is not set: runc leaves no criu-root any more");
    (hook, init)
}

#[test]
fn what_a_killed_restore_leaves_is_removed_and_the_root_filesystem_stays() {
    let lab = Lab::new(COUNTER);
    let (_hook, init) = kill_runc(&lab);
    // Another agent, that knows nothing but the name and the bundle.
    lab.runc.cleanup_killed_restore(&lab.id, &lab.bundle()).unwrap();
    assert!(!Path::new(&format!("/proc/{init}/exe")).exists(), "the parked init is still there");
    lab.assert_clean();
    lab.runc.cleanup_killed_restore(&lab.id, &lab.bundle()).unwrap();
}

#[test]
fn delete_after_a_killed_restore_does_not_empty_the_root_filesystem() {
    let lab = Lab::new(COUNTER);
    let (mut hook, _) = kill_runc(&lab);
    // CRIU fails as well, so that nothing keeps runc from deleting its directory and all that is mounted in it.
    hook.say("abort");
    wait_for("CRIU and its tasks to end", || lab.container().cgroups.processes().unwrap().is_empty());
    lab.runc.delete(&lab.id, true).unwrap();
    lab.assert_rootfs_whole();
    assert!(!lab.state_dir().exists());
}

#[test]
fn a_held_restore_can_be_ended_by_force() {
    let lab = Lab::new(COUNTER);
    lab.checkpoint();
    let Held { mut restore, init, agent: _agent, hook: _hook } = held(&lab);
    restore.kill_and_clean().unwrap();
    assert!(!Path::new(&format!("/proc/{init}/exe")).exists());
    lab.assert_clean();
}

#[test]
fn a_restore_without_images_says_what_is_missing() {
    let lab = Lab::new(COUNTER);
    fs::create_dir_all(lab.images()).unwrap();
    let error = wait(&mut lab.restore(&lab.agent())).unwrap_err().to_string();
    assert!(error.contains("descriptors.json"), "{error}");
    lab.runc.cleanup_killed_restore(&lab.id, &lab.bundle()).unwrap();
    lab.assert_clean();
}

#[test]
fn our_externals_are_those_that_runc_writes() {
    let lab = Lab::with_config(COUNTER, |config| {
        let bind = serde_json::json!({"destination": "/mnt/x", "type": "bind", "source": "/etc/hostname", "options": ["bind", "ro"]});
        config["mounts"].as_array_mut().unwrap().push(bind);
    });
    let container = lab.run();
    let externals = Externals::of(&container).unwrap();
    assert!(externals.mounts.contains(&("/mnt/x".into(), "/mnt/x".into())));
    assert!(externals.mounts.contains(&("/proc/keys".into(), "/dev/null".into())));
    assert!(externals.mounts.contains(&("/dev/null".into(), "/dev/null".into())));
    assert_eq!(externals.namespaces, Vec::<String>::new());
    externals.write_descriptors(lab.dir.path()).unwrap();
    let ours = fs::read(lab.dir.path().join("descriptors.json")).unwrap();
    lab.checkpoint_running();
    assert_eq!(ours, fs::read(lab.images().join("descriptors.json")).unwrap());
}
