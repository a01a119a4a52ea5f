//! What is not simple goes to the real tar, and nothing gets lost on the way. Needs root.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use common::{By, Place, SYSTEM, done, dress, in_whole_seconds, log, node, tree};
use flate2::Compression;
use flate2::write::GzEncoder;
use podferry_tar::arguments::{CREATE, EXTRACT};
use podferry_tar::extract::Plan;
use podferry_tar::{Error, limits};
use rustix::fs::FileType;

/// Makes a tree in an empty directory.
type Make = fn(&Path);

/// Trees that are not simple, and a part of what is said about them.
const NOT_SIMPLE: [(&str, &str, Make); 6] = [
    ("hard links", "hard links", |root| {
        fs::write(root.join("one"), b"content").unwrap();
        fs::hard_link(root.join("one"), root.join("two")).unwrap();
    }),
    ("a hole", "holes", |root| {
        let file = File::create(root.join("sparse")).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(b"middle", 1 << 19).unwrap();
    }),
    ("a large file", "more content", |root| fs::write(root.join("large"), vec![1; (1 << 20) + 1]).unwrap()),
    ("much in small files", "more content", |root| {
        for at in 0..9 {
            fs::write(root.join(at.to_string()), vec![2; 1 << 17]).unwrap();
        }
    }),
    ("a time before 1970", "modification time", |root| {
        fs::write(root.join("old"), b"").unwrap();
        dress(&root.join("old"), (0, 0), 0o644, (-5, 0));
    }),
    ("many directories in one another", "too many directories", |root| {
        fs::create_dir_all(root.join("d/".repeat(limits::DEPTH))).unwrap();
    }),
];

#[test]
fn a_tree_that_is_not_simple_is_packed_by_the_real_tar() {
    for (tree_with, why, make) in NOT_SIMPLE {
        let place = Place::new();
        let (from, to) = (place.directory("from"), place.directory("to"));
        make(&from);
        let image = place.path("image.tar.gz");
        let output = place.try_pack(By::OursOrReal, &from, &image);
        done(&output);
        assert!(log(&output).contains(why), "{tree_with}: {}", log(&output));
        assert_eq!(place.calls(), 1, "{tree_with}");
        place.unpack(By::Gnu, &image, &to);
        assert_eq!(tree(&to), in_whole_seconds(tree(&from)), "{tree_with}");
    }
}

#[test]
fn an_archive_that_is_not_simple_is_unpacked_by_the_real_tar() {
    // The real tar's archive of these is simple again, or not: the result is the same.
    for (tree_with, _, make) in NOT_SIMPLE {
        let place = Place::new();
        let (from, to) = (place.directory("from"), place.directory("to"));
        make(&from);
        place.unpack(By::OursOrReal, &place.pack(By::Gnu, &from), &to);
        assert_eq!(tree(&to), in_whole_seconds(tree(&from)), "{tree_with}");
        if ["hard links", "a hole", "a time before 1970"].contains(&tree_with) {
            assert_eq!(place.calls(), 1, "{tree_with}");
        }
        if tree_with == "a hole" {
            assert!(to.join("sparse").metadata().unwrap().blocks() * 512 < 1 << 20, "the hole is gone");
        }
        if tree_with == "hard links" {
            let inode = |name| to.join(name).metadata().unwrap().ino();
            assert_eq!(inode("one"), inode("two"));
        }
    }
}

#[test]
fn the_real_tar_finds_standard_input_where_it_was() {
    let place = Place::new();
    let (from, to) = (place.directory("from"), place.directory("to"));
    fs::write(from.join("one"), b"content").unwrap();
    fs::hard_link(from.join("one"), from.join("two")).unwrap();
    let mut image = fs::read(place.pack(By::Gnu, &from)).unwrap();
    image.splice(..0, [0xaa; 100]);
    fs::write(place.path("image"), image).unwrap();
    let mut image = File::open(place.path("image")).unwrap();
    image.seek(SeekFrom::Start(100)).unwrap();
    done(&place.try_unpack(By::OursOrReal, image, &to));
    assert_eq!(place.calls(), 1);
    assert_eq!(tree(&to), in_whole_seconds(tree(&from)));
}

#[test]
fn an_archive_from_a_pipe_is_for_the_real_tar() {
    let place = Place::new();
    let (from, to) = (place.directory("from"), place.directory("to"));
    fs::write(from.join("file"), b"content").unwrap();
    let image = fs::read(place.pack(By::Ours, &from)).unwrap();
    let mut command = place.command(By::OursOrReal);
    let mut child = command.args(EXTRACT).arg(&to).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&image).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!((place.calls(), tree(&to)), (1, tree(&from)));
}

#[test]
fn a_damaged_archive_changes_nothing_and_is_reported_by_the_real_tar() {
    let place = Place::new();
    let from = place.directory("from");
    fs::write(from.join("file"), [3; 4000]).unwrap();
    let whole = fs::read(place.pack(By::Ours, &from)).unwrap();
    for (name, damage) in [
        ("cut off", whole[..whole.len() - 1].to_vec()),
        ("another byte", {
            let mut bytes = whole.clone();
            let at = bytes.len() - 6;
            bytes[at] ^= 1;
            bytes
        }),
        ("something behind it", [&whole[..], b"more"].concat()),
        ("no archive", b"no archive".to_vec()),
        ("nothing", Vec::new()),
    ] {
        let to = place.directory(name);
        fs::write(place.path("image"), damage).unwrap();
        let output = place.try_unpack(By::Ours, File::open(place.path("image")).unwrap(), &to);
        assert_eq!(output.status.code(), Some(127), "{name}: {}", log(&output));
        assert_eq!(to.read_dir().unwrap().count(), 0, "{name}");
        let code = |by| place.try_unpack(by, File::open(place.path("image")).unwrap(), &to).status.code();
        assert_eq!(code(By::OursOrReal), code(By::Gnu), "{name}");
    }
}

#[test]
fn a_directory_in_a_file_s_place_is_left_to_the_real_tar() {
    let results = [By::OursOrReal, By::Gnu].map(|by| {
        let place = Place::new();
        let (from, to) = (place.directory("from"), place.directory("to"));
        fs::write(from.join("file"), b"content").unwrap();
        fs::create_dir(from.join("directory")).unwrap();
        fs::create_dir(to.join("file")).unwrap();
        fs::create_dir(place.path("outside")).unwrap();
        symlink(place.path("outside"), to.join("directory")).unwrap();
        let image = place.pack(By::Ours, &from);
        let code = place.try_unpack(by, File::open(&image).unwrap(), &to).status.code();
        (code, to.join("file").is_file(), to.join("directory").is_symlink())
    });
    assert_eq!(results[0], results[1]);
}

/// An archive as a hostile peer might send it.
fn archive(members: &[(&str, tar::EntryType, &str)]) -> Vec<u8> {
    let mut blocks = Vec::new();
    for (name, kind, target) in members {
        let mut header = tar::Header::new_gnu();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
        header.set_entry_type(*kind);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(0);
        header.set_cksum();
        blocks.extend_from_slice(header.as_bytes());
    }
    blocks.extend_from_slice(&[0; 1024]);
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(&blocks).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn nothing_is_unpacked_through_a_link_or_outside() {
    use tar::EntryType::{Directory, Regular, Symlink};
    let place = Place::new();
    let to = place.directory("to");
    let top = ("./", Directory, "");
    for members in [
        &[top, ("./link", Symlink, "/"), ("./link/file", Regular, "")][..],
        &[top, ("./link", Symlink, "/"), ("./link/", Directory, "")],
        &[top, ("./a/file", Regular, "")],
        &[top, ("./a", Regular, ""), ("./a/file", Regular, "")],
        &[top, ("./file", Regular, ""), ("./file", Regular, "")],
        &[top, ("./../file", Regular, "")],
        &[top, ("/file", Regular, "")],
        &[("./file", Regular, ""), top],
    ] {
        let refused = Plan::of(&archive(members), &to);
        assert!(matches!(refused, Err(Error::NotSimple { .. })), "{members:?}: {refused:?}");
    }
    assert!(Plan::of(&archive(&[top, ("./file", Regular, "")]), &to).is_ok());
}

#[test]
fn other_arguments_are_for_the_real_tar() {
    let place = Place::new();
    let version = |by| place.command(by).arg("--version").output().unwrap().stdout;
    assert_eq!(version(By::OursOrReal), version(By::Gnu));
    assert_eq!(place.calls(), 1);

    // One option more than CRIU's, and an exit code that is tar's own.
    let from = place.directory("from");
    let mut command = place.command(By::OursOrReal);
    let output = command.args(CREATE).arg("missing").stdin(File::open(&from).unwrap()).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(log(&output).contains("missing: Cannot stat"), "{}", log(&output));
    assert_eq!(place.calls(), 2);
}

#[test]
fn variables_that_mean_something_to_tar_are_for_the_real_tar() {
    let place = Place::new();
    let from = place.directory("from");
    for (calls, (name, value)) in [("TAR_OPTIONS", "--exclude=x"), ("TAPE", "-")].into_iter().enumerate() {
        let mut command = place.command(By::OursOrReal);
        command.args(CREATE).env(name, value).stdin(File::open(&from).unwrap());
        done(&command.output().unwrap());
        assert_eq!(place.calls(), calls + 1, "{name}");
    }
}

#[test]
fn without_a_real_tar_it_fails_and_says_so() {
    let place = Place::new();
    let output = place.command(By::Ours).arg("--version").output().unwrap();
    assert_eq!(output.status.code(), Some(127));
    assert!(log(&output).contains("no tar on PATH but this program itself"), "{}", log(&output));
}

#[test]
fn copies_of_it_do_not_run_each_other_for_ever() {
    let place = Place::new();
    let ours = env!("CARGO_BIN_EXE_podferry-tar");
    for copy in ["copy1", "copy2"] {
        fs::copy(ours, place.directory(copy).join("tar")).unwrap();
    }
    fs::write(place.directory("no program").join("tar"), b"no program").unwrap();
    let path = ["copy1", "missing", "ours", "copy2", "no program"]
        .map(|name| place.path(name).display().to_string())
        .join(":");
    let mut command = Command::new(ours);
    let output = command.arg0("tar").arg("--version").env("PATH", &path).output().unwrap();
    assert_eq!(output.status.code(), Some(127), "{}", log(&output));
    // With a real one behind them it is found.
    let mut command = Command::new(ours);
    let output = command.arg0("tar").arg("--version").env("PATH", format!("{path}:{SYSTEM}")).output().unwrap();
    done(&output);
    assert!(output.stdout.starts_with(b"tar (GNU tar)"));
}

#[test]
fn an_archive_that_cannot_be_written_is_an_error() {
    let place = Place::new();
    let from = place.directory("from");
    let mut command = place.command(By::OursOrReal);
    command.args(CREATE).stdin(File::open(&from).unwrap()).stdout(File::create("/dev/full").unwrap());
    let output = command.stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(log(&output).starts_with("podferry-tar: cannot write the archive"), "{}", log(&output));
    assert_eq!(place.calls(), 0);
}

#[test]
fn an_error_while_unpacking_names_the_file() {
    let place = Place::new();
    let (from, to) = (place.directory("from"), place.directory("to"));
    node(&from.join("fifo"), FileType::Fifo, 0);
    fs::write(from.join("file"), vec![1; 200_000]).unwrap();
    let image = place.pack(By::Ours, &from);
    // The mount is only in a namespace that ends with the script.
    let script = "mount -t tmpfs -o size=64k none \"$TO\" && PATH=$OURS exec \"$0\" \"$@\" <\"$IMAGE\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]).arg(place.path("ours/tar")).args(EXTRACT).arg(&to);
    command.env("TO", &to).env("IMAGE", &image).env("OURS", place.path("ours"));
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", log(&output));
    assert!(log(&output).starts_with("podferry-tar: cannot write ./file: No space left"), "{}", log(&output));
}
