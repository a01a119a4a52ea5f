//! Which parts of migrations go on: agents remember ended ones for a day.

use std::path::Path;

use podferry_part::Standing;
use serde::Deserialize;

use crate::error::Result;
use crate::host::Host;

/// What is looked at of an agent's `part.json`.
#[derive(Deserialize)]
struct Part {
    standing: Standing,
    #[serde(default)]
    tidied: bool,
}

/// And of its `pager.json`.
#[derive(Deserialize)]
struct Pager {
    state: State,
}

#[derive(Deserialize)]
struct State {
    state: String,
}

/// Whether that part has not come to its end, or something is still to be done for it. One that cannot be read may be anything.
pub(crate) fn is_under_way(host: &Host, part: &Path) -> Result<bool> {
    let text = host.text(part.join("part.json"))?;
    let Some(read) = text.and_then(|text| serde_json::from_str::<Part>(&text).ok()) else { return Ok(true) };
    Ok(match read.standing {
        Standing::Open | Standing::Sealed => true,
        Standing::Released => !read.tidied,
        Standing::Aborted => false,
        Standing::Resumed => is_filling(host, part)?,
    })
}

/// Whether a container that runs still gets its memory.
fn is_filling(host: &Host, part: &Path) -> Result<bool> {
    const LAST: [&str; 3] = ["done", "failed", "lost"];
    let Some(text) = host.text(part.join("pager.json"))? else { return Ok(false) };
    let pager = serde_json::from_str::<Pager>(&text).ok();
    Ok(pager.is_none_or(|pager| !LAST.contains(&pager.state.state.as_str())))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::host::Direct;

    #[test]
    fn a_part_is_under_way_until_nothing_is_to_be_done_for_it() {
        let node = tempfile::tempdir().unwrap();
        let host = Host::new(node.path(), Box::new(Direct));
        let part = Path::new("/var/lib/podferry/parts/m1");
        let folder = node.path().join("var/lib/podferry/parts/m1");
        fs::create_dir_all(&folder).unwrap();
        let look = |part_json: &str, pager_json: Option<&str>| {
            fs::write(folder.join("part.json"), part_json).unwrap();
            let _gone_already = fs::remove_file(folder.join("pager.json"));
            if let Some(text) = pager_json {
                fs::write(folder.join("pager.json"), text).unwrap();
            }
            is_under_way(&host, part).unwrap()
        };
        assert!(is_under_way(&host, part).unwrap(), "it has just begun");
        for (record, expected) in [
            (r#"{"standing": "open"}"#, true),
            (r#"{"standing": "sealed", "tidied": false}"#, true),
            (r#"{"standing": "released"}"#, true),
            (r#"{"standing": "released", "tidied": true, "going": false, "role": {"role": "source"}}"#, false),
            (r#"{"standing": "aborted"}"#, false),
            (r#"{"standing": "resumed"}"#, false),
            (r#"{"standing": "another"}"#, true),
            ("", true),
        ] {
            assert_eq!(look(record, None), expected, "{record}");
        }
        for (pager, expected) in [
            (r#"{"holders": [], "state": {"state": "filling", "left_pages": 3}}"#, true),
            (r#"{"state": {"state": "done", "pages": 3}}"#, false),
            (r#"{"state": {"state": "lost", "message": "x"}}"#, false),
            ("{}", true),
        ] {
            assert_eq!(look(r#"{"standing": "resumed"}"#, Some(pager)), expected, "{pager}");
        }
    }
}
