//! The access policy: a TOML file that says which clients have which roles.
//!
//! `docs/operations.md` describes the format. Errors say file, line and column, and all of them are said at once.

use std::path::Path;

use serde::Deserialize;
use toml::Spanned;

use super::pattern::Pattern;
use crate::problem::{self, FileError, Problem};

/// The largest policy that is read, in bytes: thousands of grants fit.
const MAX_BYTES: u64 = 1 << 20;

/// What somebody may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// List, look at and watch everything.
    Viewer,
    /// As a viewer; also migrate and cancel, within the limits of the grant.
    Operator,
    /// Everything that clients can do, without limits.
    Admin,
}

impl Role {
    /// Its name in the file.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }
}

/// A role, and who has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Where it stands in the file.
    pub line: usize,
    /// Which clients, by the name in their certificates.
    pub clients: Vec<Pattern>,
    /// What they may do.
    pub role: Role,
    /// Operators: which workloads; `None` for all.
    pub workloads: Option<Vec<Pattern>>,
    /// Operators: from and to which nodes; `None` for all.
    pub nodes: Option<Vec<Pattern>>,
}

impl Grant {
    pub(super) fn is_for(&self, client: &str) -> bool {
        self.clients.iter().any(|pattern| pattern.matches(client))
    }

    pub(super) fn covers_workload(&self, name: Option<&str>) -> bool {
        covers(self.workloads.as_deref(), name)
    }

    pub(super) fn covers_node(&self, name: Option<&str>) -> bool {
        covers(self.nodes.as_deref(), name)
    }
}

/// What is not known yet is covered: it is asked for again when it is known.
fn covers(patterns: Option<&[Pattern]>, name: Option<&str>) -> bool {
    match (patterns, name) {
        (Some(patterns), Some(name)) => patterns.iter().any(|pattern| pattern.matches(name)),
        _ => true,
    }
}

/// Who may do what: the grants of one file, at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    grants: Vec<Grant>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    grants: Vec<GrantTable>,
}

type Names = Spanned<Vec<Spanned<String>>>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GrantTable {
    clients: Names,
    role: Spanned<Role>,
    workloads: Option<Names>,
    nodes: Option<Names>,
}

impl Policy {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, FileError> {
        problem::load("the access policy", path, MAX_BYTES, Self::parse)
    }

    /// Checks a text.
    pub fn parse(text: &str) -> Result<Self, Vec<Problem>> {
        let file: File = toml::from_str(text).map_err(|error| vec![Problem::of_toml(text, &error)])?;
        let mut reader = Reader { text, problems: Vec::new() };
        if file.grants.is_empty() {
            let message = "there is no [[grants]]: nobody could do anything. Grant somebody the role admin, or leave `access` away in \
                           coordinator.toml";
            reader.problems.push(Problem::at(text, 0, message.to_owned()));
        }
        let grants = file.grants.iter().map(|table| reader.grant(table)).collect();
        let mut problems = reader.problems;
        problems.sort_by_key(|problem| (problem.line, problem.column));
        if problems.is_empty() { Ok(Self { grants }) } else { Err(problems) }
    }

    /// The grants that a client has.
    pub(super) fn grants_of<'a>(&'a self, client: &'a str) -> impl Iterator<Item = &'a Grant> {
        self.grants.iter().filter(move |grant| grant.is_for(client))
    }
}

struct Reader<'a> {
    text: &'a str,
    problems: Vec<Problem>,
}

impl Reader<'_> {
    fn grant(&mut self, table: &GrantTable) -> Grant {
        let role = *table.role.get_ref();
        let limits = [("workloads", &table.workloads), ("nodes", &table.nodes)];
        match role {
            Role::Operator if limits.iter().all(|(_, said)| said.is_none()) => self.problem(
                table.role.span().start,
                "an operator without limits: say `workloads`, `nodes` or both ([\"*\"] for all), or make it role = \"admin\"".to_owned(),
            ),
            Role::Operator => {}
            Role::Viewer | Role::Admin => {
                for (key, said) in limits {
                    let Some(said) = said else { continue };
                    self.problem(said.span().start, format!("`{key}` limits operators only, not the role {}", role.as_str()));
                }
            }
        }
        Grant {
            line: Problem::at(self.text, table.role.span().start, String::new()).line,
            clients: self.patterns("clients", &table.clients),
            role,
            workloads: table.workloads.as_ref().map(|said| self.patterns("workloads", said)),
            nodes: table.nodes.as_ref().map(|said| self.patterns("nodes", said)),
        }
    }

    fn patterns(&mut self, key: &str, said: &Names) -> Vec<Pattern> {
        if said.get_ref().is_empty() {
            self.problem(
                said.span().start,
                format!("`{key}` is empty, so the grant is for nothing: write names, or [\"*\"] for all"),
            );
        }
        let mut patterns = Vec::new();
        for name in said.get_ref() {
            let parse = if key == "clients" { Pattern::of_clients } else { Pattern::parse };
            match parse(name.get_ref()) {
                Ok(pattern) => patterns.push(pattern),
                Err(message) => self.problem(name.span().start, message),
            }
        }
        patterns
    }

    fn problem(&mut self, offset: usize, message: String) {
        self.problems.push(Problem::at(self.text, offset, message));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaints(text: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("access.toml");
        std::fs::write(&path, text).unwrap();
        Policy::load(&path).unwrap_err().to_string().replace(&format!("{}/", folder.path().display()), "")
    }

    #[test]
    fn errors_point_at_line_and_column_and_are_said_at_once() {
        let wrong = r#"
[[grants]]
clients = ["Ada", "bob.client.podferry.internal"]
role = "viewer"
workloads = ["*"]
[[grants]]
clients = []
role = "operator"
[[grants]]
clients = ["*"]
role = "operator"
nodes = []
workloads = ["shop?"]
[[grants]]
clients = ["root"]
role = "admin"
nodes = ["a"]
"#;
        insta::assert_snapshot!(complaints(wrong), @r#"
        access.toml:3:12: "Ada" matches no name; write 1 to 63 characters of a-z, 0-9 and '-', with '*' for any run of them
        access.toml:3:19: "bob.client.podferry.internal" matches no name; write 1 to 63 characters of a-z, 0-9 and '-', with '*' for any run of them
        access.toml:5:13: `workloads` limits operators only, not the role viewer
        access.toml:7:11: `clients` is empty, so the grant is for nothing: write names, or ["*"] for all
        access.toml:8:8: an operator without limits: say `workloads`, `nodes` or both (["*"] for all), or make it role = "admin"
        access.toml:12:9: `nodes` is empty, so the grant is for nothing: write names, or ["*"] for all
        access.toml:13:14: "shop?" matches no name; write 1 to 317 characters of a-z, 0-9, '-', '.' and '/', with '*' for any run of them
        access.toml:17:9: `nodes` limits operators only, not the role admin
        "#);
        let broken = [
            "",
            "[[grants]]\nclients = [\"a\"]\nrole = \"owner\"\n",
            "[[grants]]\nclients = \"a\"\nrole = \"admin\"\n",
            "[[grants]]\nrole = \"admin\"\n",
            "[[grants]]\nclients = [\"a\"]\nrole = \"admin\"\nworkload = []\n",
            "[[grant]]\n",
        ];
        insta::assert_snapshot!(broken.map(complaints).join("\n"), @r#"
        access.toml:1:1: there is no [[grants]]: nobody could do anything. Grant somebody the role admin, or leave `access` away in coordinator.toml
        access.toml:3:8: unknown variant `owner`, expected one of `viewer`, `operator`, `admin`
        access.toml:2:11: invalid type: string "a", expected a sequence
        access.toml:1:1: missing field `clients`
        access.toml:4:1: unknown field `workload`, expected one of `clients`, `role`, `workloads`, `nodes`
        access.toml:1:3: unknown field `grant`, expected `grants`
        "#);
    }

    #[test]
    fn a_missing_and_a_huge_file_are_named() {
        let error = Policy::load(Path::new("/nonexistent/access.toml")).unwrap_err();
        assert_eq!(error.to_string(), "cannot read the access policy /nonexistent/access.toml");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("access.toml");
        std::fs::File::create(&path).unwrap().set_len(MAX_BYTES + 1).unwrap();
        let error = Policy::load(&path).unwrap_err();
        assert!(matches!(error, FileError::TooLarge { bytes, .. } if bytes == MAX_BYTES + 1), "{error}");
    }
}
