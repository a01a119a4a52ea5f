//! What somebody asks for.

use std::fmt;

use podferry_common::id::MAX_NAME_BYTES;

/// Characters of a text that are shown: no name or id is longer.
const MAX_SHOWN: usize = MAX_NAME_BYTES;

/// The kinds of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Verb {
    /// The handshake of versions.
    Hello,
    /// All nodes.
    ListNodes,
    /// All workloads, or those of a node.
    ListWorkloads,
    /// Connections that have outlived a move.
    ListConnections,
    /// All migrations, or those of a workload.
    ListMigrations,
    /// One migration.
    GetMigration,
    /// One migration, as it goes on.
    WatchMigration,
    /// To migrate a workload.
    Migrate,
    /// To undo a migration.
    CancelMigration,
    /// How a migration was decided.
    GetDecision,
    /// To empty a node. Each migration of it is asked for on behalf of the same caller.
    Evacuate,
    /// All evacuations, or those of a node.
    ListEvacuations,
    /// One evacuation.
    GetEvacuation,
    /// One evacuation, as it goes on.
    WatchEvacuation,
    /// To stop an evacuation.
    CancelEvacuation,
}

/// Who may ask for something, as the protocol has it, whatever a policy says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Open {
    /// Clients and agents.
    Both,
    /// Agents alone.
    Agents,
    /// Clients, to look at something.
    Viewers,
    /// Clients, to change something.
    Operators,
}

impl Verb {
    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::Hello,
        Self::ListNodes,
        Self::ListWorkloads,
        Self::ListConnections,
        Self::ListMigrations,
        Self::GetMigration,
        Self::WatchMigration,
        Self::Migrate,
        Self::CancelMigration,
        Self::GetDecision,
        Self::Evacuate,
        Self::ListEvacuations,
        Self::GetEvacuation,
        Self::WatchEvacuation,
        Self::CancelEvacuation,
    ];

    /// Its name in the audit log and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hello => "hello",
            Self::ListNodes => "list_nodes",
            Self::ListWorkloads => "list_workloads",
            Self::ListConnections => "list_connections",
            Self::ListMigrations => "list_migrations",
            Self::GetMigration => "get_migration",
            Self::WatchMigration => "watch_migration",
            Self::Migrate => "migrate",
            Self::CancelMigration => "cancel_migration",
            Self::GetDecision => "get_decision",
            Self::Evacuate => "evacuate",
            Self::ListEvacuations => "list_evacuations",
            Self::GetEvacuation => "get_evacuation",
            Self::WatchEvacuation => "watch_evacuation",
            Self::CancelEvacuation => "cancel_evacuation",
        }
    }

    /// Whether it changes something.
    pub fn changes_something(self) -> bool {
        self.open() == Open::Operators
    }

    pub(super) fn open(self) -> Open {
        match self {
            Self::Hello => Open::Both,
            Self::GetDecision => Open::Agents,
            Self::ListNodes
            | Self::ListWorkloads
            | Self::ListConnections
            | Self::ListMigrations
            | Self::GetMigration
            | Self::WatchMigration
            | Self::ListEvacuations
            | Self::GetEvacuation
            | Self::WatchEvacuation => Open::Viewers,
            Self::Migrate | Self::CancelMigration | Self::Evacuate | Self::CancelEvacuation => Open::Operators,
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Hello => "say hello",
            Self::ListNodes => "list nodes",
            Self::ListWorkloads => "list workloads",
            Self::ListConnections => "list connections",
            Self::ListMigrations => "list migrations",
            Self::GetMigration => "look at a migration",
            Self::WatchMigration => "watch a migration",
            Self::Migrate => "migrate",
            Self::CancelMigration => "cancel a migration",
            Self::GetDecision => "ask for a decision",
            Self::Evacuate => "evacuate",
            Self::ListEvacuations => "list evacuations",
            Self::GetEvacuation => "look at an evacuation",
            Self::WatchEvacuation => "watch an evacuation",
            Self::CancelEvacuation => "cancel an evacuation",
        }
    }
}

/// A request, with what is known of the things that it is about. The texts are the caller's own and may be anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Action<'a> {
    /// Its kind.
    pub verb: Verb,
    /// The workload's name.
    pub workload: Option<&'a str>,
    /// The node that it leaves.
    pub source: Option<&'a str>,
    /// The node that it goes to.
    pub target: Option<&'a str>,
    /// The migration's id, or the evacuation's.
    pub migration: Option<&'a str>,
}

impl<'a> Action<'a> {
    /// A request of which nothing else is known.
    pub fn new(verb: Verb) -> Self {
        Self { verb, workload: None, source: None, target: None, migration: None }
    }

    /// A request about a migration, or an evacuation.
    pub fn on_migration(verb: Verb, id: &'a str) -> Self {
        Self { migration: Some(id), ..Self::new(verb) }
    }

    /// To empty `node`.
    pub fn evacuate(node: &'a str) -> Self {
        Self { source: Some(node), ..Self::new(Verb::Evacuate) }
    }

    /// To migrate `workload`, and to `target` unless that is empty.
    pub fn migrate(workload: &'a str, target: &'a str) -> Self {
        let target = (!target.is_empty()).then_some(target);
        Self { workload: Some(workload), target, ..Self::new(Verb::Migrate) }
    }
}

impl fmt::Display for Action<'_> {
    /// For a person: `migrate workload "shop" from node "a" to node "b"`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.verb.words())?;
        let parts = [
            (" (", self.migration, ")"),
            (" workload \"", self.workload, "\""),
            (" from node \"", self.source, "\""),
            (" to node \"", self.target, "\""),
        ];
        for (before, text, behind) in parts {
            if let Some(text) = text {
                let cut: String = text.chars().take(MAX_SHOWN).collect();
                write!(f, "{before}{}{behind}", cut.escape_debug())?;
            }
        }
        Ok(())
    }
}
