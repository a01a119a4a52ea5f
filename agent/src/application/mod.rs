//! What an application says of how a new instance of it takes the old one's place: hooks, which it has in the annotations of its
//! container's `config.json`.
//!
//! Each node goes by its own `config.json`, so neither runs what came from the other.
//!
//! - [`hook`] runs one, in the container or by HTTP,
//! - [`presets`] has those of stock Redis and `PostgreSQL`,
//! - [`relay`] lets the new instance reach the old one.

pub mod hook;
pub mod http;
pub mod presets;
pub mod relay;

use std::collections::BTreeMap;
use std::fmt;

pub use hook::Hook;

/// Says that a workload can be moved so, and in which way: see [`Kind`].
pub const APPLICATION: &str = "podferry.dev/application";
/// In front of a hook's name.
const HOOK_PREFIX: &str = "podferry.dev/application.";
/// The port at which hooks of the new instance reach the old one.
const PORT: &str = "podferry.dev/application.port";
/// The most characters of a hook.
const LONGEST_HOOK: usize = 64 << 10;

/// In which way an application is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It keeps nothing that another instance would need.
    Stateless,
    /// Its hooks move what it keeps.
    Stateful,
}

/// The hooks there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum HookName {
    /// Target: succeeds when the new instance can serve. Tried until it does.
    Ready,
    /// Target: makes the new instance follow the old one.
    Replicate,
    /// Target: succeeds when the new instance has all that the old one had when it was asked. Tried until it does.
    CaughtUp,
    /// Target: makes the new instance one of its own.
    Promote,
    /// Source: the old instance takes no more changes.
    Quiesce,
    /// Source: it takes them again.
    Unquiesce,
    /// Source: writes the state to its output.
    Export,
    /// Target: takes it from its input.
    Import,
    /// Target: fails when something is missing.
    Verify,
}

impl HookName {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Ready,
        Self::Replicate,
        Self::CaughtUp,
        Self::Promote,
        Self::Quiesce,
        Self::Unquiesce,
        Self::Export,
        Self::Import,
        Self::Verify,
    ];

    /// As it stands in annotations.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Replicate => "replicate",
            Self::CaughtUp => "caught-up",
            Self::Promote => "promote",
            Self::Quiesce => "quiesce",
            Self::Unquiesce => "unquiesce",
            Self::Export => "export",
            Self::Import => "import",
            Self::Verify => "verify",
        }
    }
}

impl fmt::Display for HookName {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.as_str())
    }
}

/// Why annotations say nothing that can be followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WrongApplication {
    /// There are none.
    #[error("config.json has no annotation {APPLICATION}")]
    None,
    /// It is none of those that are known.
    #[error("the annotation {APPLICATION} is {named:?}, and not stateless, hooks, redis or postgresql")]
    Kind {
        /// What stands there.
        named: String,
    },
    /// A hook is none.
    #[error("the annotation {HOOK_PREFIX}{name} {why}")]
    Hook {
        /// Which.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// Hooks that make no sense together.
    #[error("the hooks do not go together: {why}")]
    Together {
        /// Why not.
        why: &'static str,
    },
}

/// What an application's annotations say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Application {
    kind: Kind,
    hooks: BTreeMap<HookName, Hook>,
    port: Option<u16>,
}

impl Application {
    /// Reads a container's annotations.
    ///
    /// # Errors
    /// When there is nothing to follow in them.
    pub fn of(annotations: &BTreeMap<String, String>) -> Result<Self, WrongApplication> {
        let named = annotations.get(APPLICATION).ok_or(WrongApplication::None)?.trim();
        let (kind, preset, port) = match named {
            "stateless" => (Kind::Stateless, BTreeMap::new(), None),
            "hooks" => (Kind::Stateful, BTreeMap::new(), None),
            "redis" => (Kind::Stateful, presets::redis(), Some(presets::REDIS_PORT)),
            "postgresql" => (Kind::Stateful, presets::postgresql(), Some(presets::POSTGRESQL_PORT)),
            other => return Err(WrongApplication::Kind { named: other.chars().take(64).collect() }),
        };
        let mut application = Self { kind, hooks: preset, port };
        for (key, value) in annotations {
            let Some(name) = key.strip_prefix(HOOK_PREFIX) else { continue };
            if key == PORT {
                application.port = Some(port_of(value)?);
            } else {
                application.add(name, value)?;
            }
        }
        application.check().map_err(|why| WrongApplication::Together { why })?;
        Ok(application)
    }

    fn add(&mut self, name: &str, value: &str) -> Result<(), WrongApplication> {
        let wrong = |why: String| WrongApplication::Hook { name: name.chars().take(64).collect(), why };
        let known = HookName::ALL.into_iter().find(|hook| hook.as_str() == name);
        let hook = known.ok_or_else(|| wrong("is no hook that podferry knows".to_owned()))?;
        if value.trim().is_empty() {
            // Takes a preset's away.
            self.hooks.remove(&hook);
            return Ok(());
        }
        if value.len() > LONGEST_HOOK {
            return Err(wrong(format!("is longer than {LONGEST_HOOK} bytes")));
        }
        self.hooks.insert(hook, Hook::parse(value).map_err(wrong)?);
        Ok(())
    }

    fn check(&self) -> Result<(), &'static str> {
        let has = |hook| self.hooks.contains_key(&hook);
        if self.kind == Kind::Stateless {
            let only = |hook: &HookName| matches!(hook, HookName::Ready | HookName::Verify);
            return self.hooks.keys().all(only).then_some(()).ok_or("stateless has only ready and verify");
        }
        if has(HookName::Export) != has(HookName::Import) {
            return Err("export needs import, and import export");
        }
        if has(HookName::Replicate) != has(HookName::CaughtUp) {
            return Err("replicate needs caught-up, and caught-up replicate");
        }
        if !has(HookName::Export) && !has(HookName::Replicate) {
            return Err(
                "nothing moves the state: give export and import, or replicate and caught-up, or say that it is stateless",
            );
        }
        if has(HookName::Replicate) && self.port.is_none() {
            return Err("replicate needs podferry.dev/application.port, the port at which the old instance is reached");
        }
        if has(HookName::Quiesce) && !has(HookName::Unquiesce) {
            return Err("quiesce needs unquiesce, for a migration that is undone");
        }
        Ok(())
    }

    /// How the state moves, for comparing two nodes: the kind, and the names of the hooks that have a part in it. What they do may differ.
    pub fn method(&self) -> String {
        let has_a_part = |hook: &&HookName| !matches!(hook, HookName::Ready | HookName::Verify);
        let hooks: Vec<_> = self.hooks.keys().filter(has_a_part).map(|hook| hook.as_str()).collect();
        match self.kind {
            Kind::Stateless => "stateless".to_owned(),
            Kind::Stateful => format!("with {}", hooks.join(", ")),
        }
    }

    /// In which way it is moved.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// A hook, if it has that.
    pub fn hook(&self, name: HookName) -> Option<&Hook> {
        self.hooks.get(&name)
    }

    /// Where the old instance is reached, on its own loopback.
    pub fn port(&self) -> Option<u16> {
        self.port
    }
}

fn port_of(value: &str) -> Result<u16, WrongApplication> {
    let port = value.trim().parse().ok().filter(|port| *port > 0);
    port.ok_or_else(|| WrongApplication::Hook {
        name: "port".to_owned(),
        why: format!("is {value:?}, which is no port"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(annotations: &[(&str, &str)]) -> Result<Application, String> {
        let annotations = annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Application::of(&annotations).map_err(|error| error.to_string())
    }

    #[test]
    fn presets_are_whole_and_can_be_changed_hook_by_hook() {
        for preset in ["redis", "postgresql"] {
            of(&[(APPLICATION, preset)]).unwrap();
        }
        let redis = of(&[
            (APPLICATION, "redis"),
            ("podferry.dev/application.port", "7000"),
            ("podferry.dev/application.verify", r#"["/bin/true"]"#),
            ("podferry.dev/application.ready", " "),
        ])
        .unwrap();
        assert_eq!(redis.port(), Some(7000));
        assert_eq!(redis.hook(HookName::Verify), Some(&Hook::Command(vec!["/bin/true".to_owned()])));
        assert!(redis.hook(HookName::Ready).is_none() && redis.hook(HookName::Replicate).is_some());
        assert_eq!(of(&[(APPLICATION, "stateless")]).unwrap().kind(), Kind::Stateless);
    }

    #[test]
    fn two_nodes_that_move_the_state_in_different_ways_are_told_apart() {
        let method = |annotations: &[(&str, &str)]| of(annotations).unwrap().method();
        let redis = method(&[(APPLICATION, "redis")]);
        assert_eq!(redis, "with replicate, caught-up, promote, quiesce, unquiesce");
        assert_eq!(method(&[(APPLICATION, "redis"), ("podferry.dev/application.verify", "true")]), redis);
        let less = [("podferry.dev/application.quiesce", ""), ("podferry.dev/application.unquiesce", "")];
        assert_ne!(method(&[&[(APPLICATION, "redis")][..], &less].concat()), redis);
        assert_eq!(method(&[(APPLICATION, "stateless")]), "stateless");
        assert_eq!(method(&[(APPLICATION, "postgresql")]), "with export, import");
    }

    #[test]
    fn what_makes_no_sense_is_said_with_its_name() {
        let hook = |name: &str| format!("podferry.dev/application.{name}");
        let (export, import, quiesce) = (hook("export"), hook("import"), hook("quiesce"));
        let (replicate, caught_up) = (hook("replicate"), hook("caught-up"));
        let cases: [(&[(&str, &str)], &str); 10] = [
            (&[], "no annotation podferry.dev/application"),
            (&[(APPLICATION, "magic")], "\"magic\""),
            (&[(APPLICATION, "hooks")], "nothing moves the state"),
            (&[(APPLICATION, "hooks"), (&export, "x")], "export needs import"),
            (&[(APPLICATION, "hooks"), (&replicate, "x")], "replicate needs caught-up"),
            (&[(APPLICATION, "hooks"), (&replicate, "x"), (&caught_up, "x")], "application.port"),
            (&[(APPLICATION, "hooks"), (&export, "x"), (&import, "x"), (&quiesce, "x")], "quiesce needs unquiesce"),
            (&[(APPLICATION, "stateless"), (&export, "x")], "only ready and verify"),
            (&[(APPLICATION, "redis"), ("podferry.dev/application.exprot", "x")], "exprot is no hook"),
            (&[(APPLICATION, "redis"), ("podferry.dev/application.port", "0")], "no port"),
        ];
        for (annotations, words) in cases {
            let said = of(annotations).unwrap_err();
            assert!(said.contains(words), "{said}, not {words}");
        }
    }
}
