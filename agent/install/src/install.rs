//! Installing, upgrading, and doing it again.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::agent_config::{self, Settings};
use crate::block;
use crate::bundle::{self, Bundle, WrapperConfig};
use crate::busy;
use crate::error::{At, Error, Result};
use crate::host::Host;
use crate::journal::{Change, Journal, mode_of, remove_tree, write_as_owned};
use crate::restart::Restart;
use crate::runtime::{self, Edit, Plan, Runtime, WRAPPER};

/// Where the installation goes unless the node has its own place for such things.
const FOLDER: &str = "/opt/podferry";
/// Container-Optimized OS: `/opt` is read-only, and programs run from here.
const FOLDER_ON_COS: &str = "/home/kubernetes/bin/podferry";
const TRACEFS: &str = "/sys/kernel/tracing";

/// What to install, and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// The folder on the node.
    pub folder: Option<PathBuf>,
    /// The runtime, if it is not to be looked for.
    pub runtime: Option<Runtime>,
    /// containerd's configuration, where it is in an unusual place.
    pub containerd_config: Option<PathBuf>,
    /// How the runtime is restarted.
    pub restart: Restart,
    /// Also when migrations are under way.
    pub force: bool,
}

impl Options {
    /// The folder of the installation on this node.
    pub fn folder(&self, host: &Host) -> Result<PathBuf> {
        if let Some(folder) = &self.folder {
            return Ok(folder.clone());
        }
        let is_cos = runtime::system_id(host)? == "cos";
        Ok(PathBuf::from(if is_cos { FOLDER_ON_COS } else { FOLDER }))
    }

    /// What the handler runs.
    pub(crate) fn wrapper(folder: &Path) -> PathBuf {
        folder.join(bundle::CURRENT).join(WRAPPER)
    }
}

/// What installing did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installed {
    /// The bundle that is in use now.
    pub bundle: String,
    /// Which one was before, if it was another.
    pub before: Option<String>,
    /// Which runtime has the handler.
    pub runtime: Runtime,
    /// Where the handler is written.
    pub handler: PathBuf,
    /// Whether the runtime was restarted.
    pub restarted: bool,
    /// What is not as it should be, without being in the way.
    pub warnings: Vec<String>,
}

/// Installs the bundle, or a newer one over another.
pub fn install(host: &Host, options: &Options, bundle: &Bundle, settings: &Settings) -> Result<Installed> {
    agent_config::refuse_decided(&settings.extra)?;
    let runtime = runtime::find_runtime(host, options.runtime)?;
    let folder = options.folder(host)?;
    if let Some(journal) = Journal::load(host, &folder)? {
        journal.remove_unfinished(host)?;
    }
    let plan = runtime::plan(host, runtime, options.containerd_config.as_deref(), &Options::wrapper(&folder))?;
    refuse_what_is_foreign(host, &folder, &plan.edit)?;
    let changes_runtime = differs(host, &plan.edit)?;
    if changes_runtime {
        refuse_while_busy(host, options.force)?;
        options.restart.check(host, runtime)?;
    }

    let mut work = Work::begin(host, folder)?;
    let before = work.journal.bundle.clone();
    work.journal.leaving = false;
    work.journal.runc = Some(plan.runc.clone());
    work.lay_bundle(bundle, &plan)?;
    work.write_agent_config(bundle, settings, &plan, runtime)?;
    bundle.switch(host, &work.folder)?;
    work.journal.bundle = Some(bundle.name().to_owned());
    work.journal.save(host, &work.folder)?;
    if options.restart == Restart::Never && !changes_runtime {
        // Whoever restarts it has had the time since the installation before.
        work.journal.restart_needed = false;
    }
    work.register(&plan.edit)?;
    let restarted = work.restart(&options.restart, runtime)?;
    work.drop_old_bundles(bundle.name(), before.as_deref())?;
    let warnings = work.mount_tracefs().err().map(|error| format!("no tracefs: {}", crate::chain(&error)));
    Ok(Installed {
        bundle: bundle.name().to_owned(),
        before: before.filter(|before| before != bundle.name()),
        runtime,
        handler: plan.edit.path().to_owned(),
        restarted,
        warnings: warnings.into_iter().collect(),
    })
}

/// Refuses when migrations are under way: a restart of the runtime makes their pods' creation fail, and a pod that has moved away but
/// is still here must not be started again by a runc that knows nothing of it.
pub(crate) fn refuse_while_busy(host: &Host, force: bool) -> Result<()> {
    let path = Path::new(agent_config::STATE).join("parts");
    let is_here = |pod: &String| host.has(Path::new("/var/lib/kubelet/pods").join(pod));
    let fenced = host.names(agent_config::FENCES)?.iter().filter(|pod| is_here(pod)).count();
    let mut count = fenced;
    for part in host.names(&path)? {
        count += usize::from(busy::is_under_way(host, &path.join(part))?);
    }
    if count > 0 && !force { Err(Error::Busy { count, path }) } else { Ok(()) }
}

/// Refuses to write over files that are not the installer's, since nothing would bring them back, and to share folders with an installation that
/// is somebody else's, since uninstalling removes them.
fn refuse_what_is_foreign(host: &Host, folder: &Path, edit: &Edit) -> Result<()> {
    let journal = Journal::load(host, folder)?;
    let noted = journal.as_ref().map(|journal| journal.changes.as_slice()).unwrap_or_default();
    let handler = if let Edit::File { path, .. } = edit { Some(path.clone()) } else { None };
    for path in handler.into_iter().chain([PathBuf::from(agent_config::PATH)]) {
        if host.has(&path) && !noted.contains(&Change::File { path: path.clone() }) {
            return Err(Error::ForeignFile { path });
        }
    }
    // A node with a journal was looked at before anything of it was noted.
    let foreign = [agent_config::STATE, agent_config::IDENTITY].into_iter().find(|path| host.has(path));
    match foreign.filter(|_| journal.is_none()) {
        Some(path) => Err(Error::ForeignFolder { path: path.into() }),
        None => Ok(()),
    }
}

/// Whether the edit changes anything.
pub(crate) fn differs(host: &Host, edit: &Edit) -> Result<bool> {
    let now = host.text(edit.path())?;
    Ok(match edit {
        Edit::File { content, .. } => now.as_ref() != Some(content),
        Edit::Block { body, .. } => now.as_ref().is_none_or(|now| block::insert(now, body) != *now),
    })
}

/// An installation under way.
struct Work<'a> {
    host: &'a Host,
    folder: PathBuf,
    journal: Journal,
}

impl<'a> Work<'a> {
    fn begin(host: &'a Host, folder: PathBuf) -> Result<Self> {
        if let Some(journal) = Journal::load(host, &folder)? {
            return Ok(Self { host, folder, journal });
        }
        let mut journal = Journal::default();
        let above = folder.parent().unwrap_or(Path::new("/")).to_owned();
        journal.changes = missing_folders(host, &above).into_iter().map(|path| Change::Folder { path }).collect();
        make_folder(host, &folder, 0o755)?;
        journal.save(host, &folder)?;
        Ok(Self { host, folder, journal })
    }

    fn note(&mut self, change: Change) -> Result<()> {
        self.journal.note(self.host, &self.folder, change)
    }

    fn lay_bundle(&mut self, bundle: &Bundle, plan: &Plan) -> Result<()> {
        for path in [format!(".{}.new", bundle.name()), bundle.name().to_owned()].map(|name| self.folder.join(name)) {
            self.note(Change::Tree { path })?;
        }
        for path in [".current.new", bundle::CURRENT].map(|name| self.folder.join(name)) {
            self.note(Change::File { path })?;
        }
        bundle.lay(self.host, &self.folder, &WrapperConfig::with_runc(plan.runc.clone()))
    }

    fn write_agent_config(
        &mut self,
        bundle: &Bundle,
        settings: &Settings,
        plan: &Plan,
        runtime: Runtime,
    ) -> Result<()> {
        self.make_folder(Path::new(agent_config::PATH).parent().unwrap_or(Path::new("/etc")), 0o755)?;
        let text = agent_config::render(
            settings,
            &self.folder.join(bundle.name()),
            &plan.runc,
            &plan.runc_root,
            runtime.layers(),
        );
        self.note(Change::File { path: agent_config::PATH.into() })?;
        for folder in ["bundles", "logs"].map(|name| Path::new(agent_config::STATE).join(name)) {
            self.make_folder(&folder, 0o700)?;
        }
        if self.host.text(agent_config::PATH)?.as_ref() == Some(&text) {
            return Ok(());
        }
        self.host.write(agent_config::PATH, text.as_bytes(), 0o644)
    }

    /// Makes a folder, and notes those that were not there.
    fn make_folder(&mut self, folder: &Path, mode: u32) -> Result<()> {
        for path in missing_folders(self.host, folder) {
            self.note(Change::Folder { path })?;
        }
        make_folder(self.host, folder, mode)
    }

    /// Writes the handler, if it is not there. What an older version wrote elsewhere is taken out.
    fn register(&mut self, edit: &Edit) -> Result<()> {
        let here = edit.path().to_owned();
        if !differs(self.host, edit)? {
            return Ok(());
        }
        self.journal.restart_needed = true;
        self.journal.save(self.host, &self.folder)?;
        let is_old = |change: &Change| matches!(change, Change::Block { path, .. } if *path != here);
        self.journal.undo(self.host, &self.folder, is_old)?;
        match edit {
            Edit::File { path, content } => {
                self.make_folder(path.parent().unwrap_or(Path::new("/")), 0o755)?;
                self.note(Change::File { path: path.clone() })?;
                self.host.write(path, content.as_bytes(), 0o644)
            }
            Edit::Block { path, body } => self.add_block(path, body),
        }
    }

    fn add_block(&mut self, path: &Path, body: &str) -> Result<()> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".before-podferry");
        let original = path.with_file_name(name);
        let text = self.host.text(path)?.unwrap_or_default();
        let here = self.host.path(path);
        let (mode, without) = (mode_of(&here)?, block::remove(&text));
        self.note(Change::Block { path: path.to_owned(), original: original.clone() })?;
        if !runtime::is_bare(&without) {
            // Made for the block or not: what others have written into it makes it theirs.
            self.journal.forget(self.host, &self.folder, &Change::File { path: path.to_owned() })?;
        }
        self.host.write(&original, without.as_bytes(), mode)?;
        write_as_owned(&here, block::insert(&text, body).as_bytes(), mode)
    }

    fn restart(&mut self, how: &Restart, runtime: Runtime) -> Result<bool> {
        if !self.journal.restart_needed || *how == Restart::Never {
            return Ok(false);
        }
        how.check(self.host, runtime)?;
        how.run(self.host, runtime)?;
        self.journal.restart_needed = false;
        self.journal.save(self.host, &self.folder)?;
        Ok(true)
    }

    /// The bundle before stays: workers, pagers and CRIU of migrations that began with it run on.
    fn drop_old_bundles(&mut self, now: &str, before: Option<&str>) -> Result<()> {
        let keep: Vec<_> = [Some(now), before].into_iter().flatten().map(|name| self.folder.join(name)).collect();
        let is_old = |change: &Change| matches!(change, Change::Tree { path } if !keep.contains(path));
        self.journal.undo(self.host, &self.folder, is_old)?;
        remove_tree(&self.host.path(self.folder.join(bundle::LEFTOVER)))
    }

    /// The agent counts writes with it. Some systems do not mount it before somebody asks.
    fn mount_tracefs(&mut self) -> Result<()> {
        if self.host.has(Path::new(TRACEFS).join("trace")) || self.host.is_mounted(TRACEFS)? {
            return Ok(());
        }
        self.note(Change::Mount { path: TRACEFS.into() })?;
        self.host.run(&["mount", "-t", "tracefs", "tracefs", TRACEFS]).map(drop)
    }
}

/// Of a folder and those above it, the ones that are not there, the highest first.
fn missing_folders(host: &Host, folder: &Path) -> Vec<PathBuf> {
    let mut missing: Vec<_> = folder.ancestors().take_while(|folder| !host.has(folder)).map(Path::to_owned).collect();
    missing.reverse();
    missing
}

fn make_folder(host: &Host, folder: &Path, mode: u32) -> Result<()> {
    let here = host.path(folder);
    if here.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(&here).at("make", &here)?;
    fs::set_permissions(&here, fs::Permissions::from_mode(mode)).at("make", &here)
}
