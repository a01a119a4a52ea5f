//! Two network namespaces and the veth pair between them.

use std::process::Command as Blocking;

use tokio::process::Command;

use super::Error;

const SOURCE_ADDRESS: &str = "10.231.77.1/30";
const TARGET_ADDRESS: &str = "10.231.77.2";
const PORT: u16 = 7443;
const DEVICE: &str = "stream";

/// Two network namespaces that reach each other.
#[derive(Debug, Clone)]
pub(crate) struct Ends {
    /// The sender's, as `ip netns` knows it.
    pub(crate) source: String,
    /// The receiver's.
    pub(crate) target: String,
    /// Where the receiver listens, as IP:PORT.
    pub(crate) address: String,
}

/// Exists while it is measured on; dropping it removes the namespaces and, with them, their devices.
pub(super) struct Link(Ends);

impl Link {
    pub(super) async fn new() -> Result<Self, Error> {
        let id = std::process::id();
        let address = format!("{TARGET_ADDRESS}:{PORT}");
        let link = Self(Ends { source: format!("pfstream-{id}-s"), target: format!("pfstream-{id}-t"), address });
        let Ends { source, target, .. } = link.ends();
        for namespace in [source, target] {
            ip(&["netns", "add", namespace]).await?;
        }
        ip(&["-n", source, "link", "add", DEVICE, "type", "veth", "peer", "name", DEVICE, "netns", target]).await?;
        ip(&["-n", source, "address", "add", SOURCE_ADDRESS, "dev", DEVICE]).await?;
        ip(&["-n", target, "address", "add", &format!("{TARGET_ADDRESS}/30"), "dev", DEVICE]).await?;
        for namespace in [source, target] {
            ip(&["-n", namespace, "link", "set", DEVICE, "up"]).await?;
        }
        Ok(link)
    }

    /// Its two ends.
    pub(super) fn ends(&self) -> &Ends {
        &self.0
    }

    /// Limits what the source sends, as `tc` writes rates; none for no limit.
    pub(super) async fn limit(&self, rate: Option<&str>) -> Result<(), Error> {
        let Some(rate) = rate else {
            return command("tc", &["-n", &self.0.source, "qdisc", "del", "dev", DEVICE, "root"]).await;
        };
        let limit = ["tbf", "rate", rate, "burst", "256kb", "latency", "50ms"];
        let mut arguments = vec!["-n", &self.0.source, "qdisc", "replace", "dev", DEVICE, "root"];
        arguments.extend(limit);
        command("tc", &arguments).await
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        for namespace in [&self.0.source, &self.0.target] {
            // When making it failed half way there may be none.
            let _gone = Blocking::new("ip").args(["netns", "del", namespace]).output();
        }
    }
}

async fn ip(arguments: &[&str]) -> Result<(), Error> {
    command("ip", arguments).await
}

async fn command(program: &str, arguments: &[&str]) -> Result<(), Error> {
    let failed = |reason| Error::Network { command: format!("{program} {}", arguments.join(" ")), reason };
    let output = Command::new(program).args(arguments).output().await.map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}
