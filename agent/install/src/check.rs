//! Looking at a node: what is installed, and whether it can work.

use std::path::Path;

use serde::Serialize;

use crate::agent_config;
use crate::bundle;
use crate::error::Result;
use crate::host::Host;
use crate::install::Options;
use crate::journal::Journal;
use crate::runtime::{self, Edit};

/// The oldest runc that the agent can work with.
const RUNC: (u64, u64) = (1, 3);

/// What a look at a node found.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Which runtime it has.
    pub runtime: String,
    /// The bundle that is in use, if one is installed.
    pub bundle: Option<String>,
    /// Containers of the handler, sandboxes among them.
    pub containers: usize,
    /// What is not as it should be, with what to do.
    pub problems: Vec<String>,
}

/// Looks at the node, and changes nothing.
pub fn check(host: &Host, options: &Options) -> Result<Report> {
    let runtime = runtime::find_runtime(host, options.runtime)?;
    let folder = options.folder(host)?;
    let wrapper = Options::wrapper(&folder);
    let plan = runtime::plan(host, runtime, options.containerd_config.as_deref(), &wrapper)?;
    let journal = Journal::load(host, &folder)?;
    let mut problems = Vec::new();
    match &journal {
        None => problems.push("podferry is not installed here".to_owned()),
        Some(journal) => problems.extend(of_installation(host, &folder, journal, &plan.edit)?),
    }
    problems.extend(of_runc(host, &plan.runc));
    Ok(Report {
        runtime: runtime.name().to_owned(),
        bundle: journal.and_then(|journal| journal.bundle),
        containers: runtime.containers_of_handler(host, &wrapper)?,
        problems,
    })
}

fn of_installation(host: &Host, folder: &Path, journal: &Journal, edit: &Edit) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    if journal.leaving {
        problems.push("uninstalling has begun, and waits for the last containers of the handler".to_owned());
        return Ok(problems);
    }
    if bundle::current(host, folder) != journal.bundle {
        problems.push(format!(
            "{} leads to another bundle than was installed: install again",
            folder.join(bundle::CURRENT).display()
        ));
    }
    if crate::install::differs(host, edit)? {
        problems.push(format!("{} does not have the handler as it should be: install again", edit.path().display()));
    }
    if journal.restart_needed {
        problems.push(
            "the runtime has not been restarted since its configuration was changed: install again, or restart it"
                .to_owned(),
        );
    }
    for needed in
        [agent_config::PATH, "/etc/podferry/tls/cert.pem", "/etc/podferry/tls/key.pem", "/etc/podferry/tls/ca.pem"]
    {
        if !host.has(needed) {
            problems.push(format!("{needed} is missing: the agent cannot start"));
        }
    }
    let criu = folder.join(bundle::CURRENT).join("tools/bin/criu");
    if let Err(error) = host.run(&[&criu.to_string_lossy(), "check"]) {
        problems.push(format!("CRIU cannot work on this node: {}", crate::chain(&error)));
    }
    Ok(problems)
}

fn of_runc(host: &Host, runc: &Path) -> Option<String> {
    let said = match host.run(&[&runc.to_string_lossy(), "--version"]) {
        Ok(said) => said,
        Err(error) => return Some(crate::chain(&error)),
    };
    let version = said.split_whitespace().nth(2).unwrap_or_default();
    let mut parts = version.split(['.', '-']).map_while(|part| part.parse::<u64>().ok());
    let found = (parts.next()?, parts.next()?);
    (found < RUNC)
        .then(|| format!("{} is runc {version}, and 1.3 or newer is needed for pods that arrive", runc.display()))
}
