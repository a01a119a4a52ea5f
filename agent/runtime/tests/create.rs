//! Containers that are created, held by runc, and started, with a real runc.

mod lab;

use std::time::Duration;

use lab::{COUNTER, Lab, PATIENCE, wait_for};
use podferry_runtime::{CreateRequest, Error};
use serde_json::json;

fn request(lab: &Lab) -> CreateRequest {
    CreateRequest {
        id: lab.id.clone(),
        bundle: lab.bundle(),
        stdio: lab.keeper(),
        log: lab.dir.path().join("runc-create.log"),
        note: Some(lab.work()),
        patience: PATIENCE,
    }
}

#[test]
fn what_is_created_waits_for_its_start_and_then_runs_with_its_output_kept() {
    let lab = Lab::new(COUNTER);
    lab.runc.create(request(&lab)).unwrap();
    let held = lab.container();
    assert!(held.is_alive() && held.awaits_start() && !held.ended_unstarted());
    assert_eq!(lab.runc.restores_from(&lab.id).unwrap(), Some(lab.work()), "whose it is");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(lab.count(), 0, "it ran before it was started");
    lab.runc.start(&lab.id, &lab.dir.path().join("runc-start.log")).unwrap();
    wait_for("the program to count", || lab.count() > 2);
    let runs = lab.container();
    assert!(runs.is_alive() && !runs.awaits_start() && runs.init == held.init);
    assert_eq!(lab.runc.restores_from(&lab.id).unwrap(), None);
    wait_for("its output", || std::fs::read_to_string(lab.log()).is_ok_and(|text| text.contains('2')));
    assert!(!lab.runc.is_at_work(&lab.id));
    // One that a `runc start` which was killed has left.
    std::fs::write(lab.state_dir().join("exec.fifo"), "").unwrap();
    assert!(!lab.container().awaits_start(), "it runs");
}

#[test]
fn what_dies_before_its_start_is_told_apart_and_leaves_nothing() {
    let lab = Lab::new(COUNTER);
    lab.runc.create(request(&lab)).unwrap();
    lab.runc.kill(&lab.id, "KILL").unwrap();
    wait_for("its end", || !lab.container().is_alive());
    assert!(lab.container().ended_unstarted());
    lab.runc.cleanup_killed_restore(&lab.id, &lab.bundle()).unwrap();
    lab.assert_clean();
    assert_eq!(lab.runc.restores_from(&lab.id).unwrap(), None);
}

#[test]
fn a_program_that_is_missing_is_found_when_it_is_created() {
    let lab = Lab::with_config(COUNTER, |config| config["process"]["args"] = json!(["/bin/none"]));
    let failure = lab.runc.create(request(&lab)).unwrap_err();
    assert!(matches!(&failure, Error::Runc { detail, .. } if detail.contains("/bin/none")), "{failure}");
    lab.runc.cleanup_killed_restore(&lab.id, &lab.bundle()).unwrap();
    lab.assert_clean();
}

/// One that does not end would hold everybody up.
#[test]
fn a_runc_that_takes_too_long_is_seen_by_others_and_ended() {
    let hook = json!([{"path": "/bin/sleep", "args": ["sleep", "60"]}]);
    let lab = Lab::with_config(COUNTER, |config| config["hooks"] = json!({"createRuntime": hook}));
    std::thread::scope(|scope| {
        let creating =
            scope.spawn(|| lab.runc.create(CreateRequest { patience: Duration::from_secs(2), ..request(&lab) }));
        wait_for("runc to be at work", || lab.runc.is_at_work(&lab.id));
        assert!(!lab.runc.wait_for_others(&lab.id, Duration::from_millis(50)));
        let failure = creating.join().unwrap().unwrap_err();
        assert!(failure.to_string().contains("took too long"), "{failure}");
    });
    assert!(lab.runc.wait_for_others(&lab.id, Duration::ZERO));
    // Its init ends when runc has, and the kernel keeps a cgroup until then.
    wait_for("the clean-up", || lab.runc.cleanup_killed_restore(&lab.id, &lab.bundle()).is_ok());
    lab.assert_clean();
}
