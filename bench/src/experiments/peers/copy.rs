//! Copying folders from one node to the other as an administrator would: tar through one TCP connection, neither packed nor encrypted.

use std::{
    io::{self, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use socket2::SockRef;

/// podferry's own choice, so that the two are alike: BBR, the default of some machines, carries half as much between local nodes.
const CONGESTION_CONTROL: &[u8] = b"cubic";
/// What a helper prints when it is ready for its work.
pub(in crate::experiments) const READY: &str = "ready";

/// Takes what [`send`] sends: each of its folders, by its last name, comes to one of `into` with the same last name.
pub fn receive(listen: SocketAddr, into: &[PathBuf]) -> io::Result<()> {
    let listener = TcpListener::bind(listen)?;
    println!("{READY}");
    io::stdout().flush()?;
    let (mut stream, _) = listener.accept()?;
    let mut command = tar("--extract");
    // Names in the archive are without their folders, which differ between the nodes.
    command
        .args(into.iter().filter_map(|folder| Some(format!("--transform=s,^{},{},", last(folder)?, folder.display()))));
    let mut child = command.stdin(Stdio::piped()).spawn()?;
    let copied = child.stdin.take().map_or(Ok(0), |mut input| io::copy(&mut stream, &mut input));
    ended(child)?;
    match copied {
        // tar does not read what follows the end of the archive. The sender is still to get rid of it.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => io::copy(&mut stream, &mut io::sink()).map(drop),
        copied => copied.map(drop),
    }
}

/// Sends folders to where [`receive`] listens.
pub fn send(to: SocketAddr, folders: &[PathBuf]) -> io::Result<()> {
    let mut stream = TcpStream::connect(to)?;
    // What the kernel does not have stays as it is.
    let _ = SockRef::from(&stream).set_tcp_congestion(CONGESTION_CONTROL);
    let mut command = tar("--create");
    for folder in folders {
        command.arg("-C").arg(folder.parent().unwrap_or(Path::new("/"))).args(last(folder));
    }
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    let copied = child.stdout.take().map(|mut output| io::copy(&mut output, &mut stream)).transpose();
    ended(child)?;
    copied.map(drop)
}

fn last(folder: &Path) -> Option<&str> {
    folder.file_name()?.to_str()
}

fn tar(what: &str) -> Command {
    let mut command = Command::new("tar");
    command.args([what, "--file=-", "--absolute-names", "--numeric-owner", "--xattrs", "--xattrs-include=*"]);
    command
}

fn ended(mut child: Child) -> io::Result<()> {
    let status = child.wait()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("tar ended with {status}"))) }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn folders_arrive_where_they_are_wanted() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for folder in ["a/images", "b/upper/deep"] {
            fs::create_dir_all(one.path().join(folder)).unwrap();
        }
        fs::write(one.path().join("a/images/pages"), vec![7; 100_000]).unwrap();
        fs::write(one.path().join("b/upper/deep/file"), "x").unwrap();
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let into = [two.path().join("x/images"), two.path().join("y/upper")];
        for folder in &into {
            fs::create_dir_all(folder).unwrap();
        }
        let receiver = std::thread::spawn({
            let into = into.clone();
            move || receive(free, &into)
        });
        let folders = [one.path().join("a/images"), one.path().join("b/upper")];
        let mut tries = 0;
        while let Err(error) = send(free, &folders) {
            tries += 1;
            assert!(tries < 100, "{error}");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        receiver.join().unwrap().unwrap();
        assert_eq!(fs::read(into[0].join("pages")).unwrap().len(), 100_000);
        assert_eq!(fs::read_to_string(into[1].join("deep/file")).unwrap(), "x");
    }
}
