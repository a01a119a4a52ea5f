//! What is written down is read again, also by others.

use super::*;

fn open(role: Role) -> PartRecord {
    PartRecord {
        migration: MigrationId::new(),
        workload: "w".to_owned(),
        standing: Standing::Open,
        tidied: false,
        going: false,
        written: SystemTime::now(),
        role,
    }
}

fn target() -> Role {
    Role::Target {
        source_node: "n1".to_owned(),
        keep_connections: true,
        link: None,
        plan: None,
        netns: None,
        fetch_from: None,
        takes_over: false,
        cold: false,
        volumes: Vec::new(),
        pod: None,
    }
}

#[test]
fn a_source_of_an_older_agent_was_told_nothing_and_what_one_was_told_is_there_again() {
    let mut record = open(Role::Source {
        root: "/run/runc".into(),
        init_pid: 7,
        init_start: 8,
        bundle: "/bundles/w".into(),
        link: None,
        netns: None,
        fetched_by: None,
        take_over: None,
        stop: Some(StopNote { signal: 3, grace: Duration::from_secs(30), begun: None, told: false }),
        volumes: vec![Volume { destination: "/data".into(), dir: "/volumes/data".into(), made: false }],
        fence: None,
    });
    record.note_stop(|stop| (stop.begun, stop.told) = (Some(SystemTime::UNIX_EPOCH), true));
    let mut text = serde_json::to_value(&record).unwrap();
    let again: PartRecord = serde_json::from_value(text.clone()).unwrap();
    assert_eq!((again.stop(), again.stop().unwrap().told), (record.stop(), true));
    assert_eq!((again.volumes(), again.volumes().len()), (record.volumes(), 1));
    for newer in ["stop", "volumes"] {
        text["role"].as_object_mut().unwrap().remove(newer).unwrap();
    }
    let mut older: PartRecord = serde_json::from_value(text).unwrap();
    assert_eq!(older.volumes(), []);
    older.note_stop(|stop| stop.told = true);
    assert_eq!(older.stop(), None);
}

/// `podferry-install` reads that much of them (`agent/install/src/busy.rs`).
#[test]
fn whether_a_part_has_ended_is_told_in_the_same_words_for_ever() {
    use crate::pager::messages::PagerState;
    let mut record = open(target());
    for (standing, word) in [
        (Standing::Open, "open"),
        (Standing::Sealed, "sealed"),
        (Standing::Released, "released"),
        (Standing::Resumed, "resumed"),
        (Standing::Aborted, "aborted"),
    ] {
        (record.standing, record.tidied) = (standing, true);
        let text = serde_json::to_value(&record).unwrap();
        assert_eq!((&text["standing"], &text["tidied"]), (&word.into(), &true.into()));
    }
    let (pages, faults, fill_ms) = (1, 1, 1);
    let states = [PagerState::Filling { left_pages: 1 }, PagerState::Done { pages, faults, fill_ms }];
    assert_eq!(states.map(|state| serde_json::to_value(state).unwrap()["state"].clone()), ["filling", "done"]);
}

#[test]
fn no_folder_is_made_before_the_record_that_tells_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let dirs = PartDirs { state: path("state"), run: path("file/run"), images: path("images"), work: path("work") };
    // Where the agent would be killed, the first of the folders cannot be made.
    fs::write(path("file"), "").unwrap();
    let mut record = open(target());
    let error = record.begin(&dirs).unwrap_err();
    assert!(error.to_string().contains(&dirs.run.display().to_string()), "{error}");
    let noted = record::load::<PartRecord>(&dirs.part_file()).unwrap().unwrap();
    assert_eq!((noted.migration, noted.standing), (record.migration, Standing::Open));
    assert!(!dirs.images.exists() && !dirs.work.exists());
}
