//! Hooks for what many run as it comes: their annotation has no more than a name.
//!
//! They are shell scripts for the shell and the client program that are in the official images. `PODFERRY_PORT` is the port of the
//! instance itself, `PODFERRY_SOURCE_HOST` and `PODFERRY_SOURCE_PORT` lead to the old one.

use std::collections::BTreeMap;

use super::{Hook, HookName};

/// Where Redis listens.
pub const REDIS_PORT: u16 = 6379;
/// Where `PostgreSQL` listens.
pub const POSTGRESQL_PORT: u16 = 5432;

/// Redis 6.2 and later: the new instance is a replica until it has all that the old one had when it was paused. A password is taken from
/// `REDISCLI_AUTH` in the container's environment, as redis-cli does.
pub(super) fn redis() -> BTreeMap<HookName, Hook> {
    scripts([
        (HookName::Ready, r#"[ "$(redis-cli -p "$PODFERRY_PORT" PING)" = PONG ]"#.to_owned()),
        (HookName::Replicate, format!("{REDIS_SAYS_OK}{REDIS_FIELD}{REDIS_REPLICATE}")),
        (HookName::CaughtUp, format!("{REDIS_FIELD}{REDIS_CAUGHT_UP}")),
        (HookName::Promote, format!("{REDIS_SAYS_OK}ok REPLICAOF NO ONE")),
        // Longer than any freeze may take; it ends with the instance, or with unquiesce.
        (HookName::Quiesce, format!("{REDIS_SAYS_OK}ok CLIENT PAUSE 3600000 WRITE")),
        (HookName::Unquiesce, format!("{REDIS_SAYS_OK}ok CLIENT UNPAUSE")),
    ])
}

/// redis-cli ends well also when Redis refuses.
const REDIS_SAYS_OK: &str = r#"
ok() {
    said=$(redis-cli -p "$PODFERRY_PORT" "$@") || exit 1
    [ "$said" = OK ] || { echo "$1: $said" >&2; exit 1; }
}
"#;

/// What a section of `INFO` says of one thing; its lines end with a carriage return.
const REDIS_FIELD: &str = r#"
field() {
    while IFS=: read -r key value; do
        [ "$key" = "$1" ] || continue
        printf '%s' "${value%"$(printf '\r')"}"
        return 0
    done
    return 1
}
"#;

/// One that is a replica itself would come out of this as a master of its own.
const REDIS_REPLICATE: &str = r#"
role=$(redis-cli -h "$PODFERRY_SOURCE_HOST" -p "$PODFERRY_SOURCE_PORT" INFO replication | field role) || exit 1
[ "$role" = master ] || { echo "the old instance is a $role itself: move it live, or give hooks of its own" >&2; exit 1; }
[ -z "$REDISCLI_AUTH" ] || ok CONFIG SET masterauth "$REDISCLI_AUTH"
ok REPLICAOF "$PODFERRY_SOURCE_HOST" "$PODFERRY_SOURCE_PORT"
"#;

/// How far the old one is is asked before how far the new one is: so the new one has at least all that the old one had when this
/// began.
const REDIS_CAUGHT_UP: &str = r#"
there=$(redis-cli -h "$PODFERRY_SOURCE_HOST" -p "$PODFERRY_SOURCE_PORT" INFO replication | field master_repl_offset) || exit 1
here=$(redis-cli -p "$PODFERRY_PORT" INFO replication) || exit 1
[ "$(echo "$here" | field master_link_status)" = up ] || { echo "the replication link is not up" >&2; exit 1; }
[ "$(echo "$here" | field master_sync_in_progress)" = 0 ] || { echo "the first synchronization goes on" >&2; exit 1; }
offset=$(echo "$here" | field slave_repl_offset) || exit 1
[ "$offset" -ge "$there" ] || { echo "it is at $offset of $there" >&2; exit 1; }
"#;

/// `PostgreSQL`: all roles and databases by `pg_dumpall` and `psql`, over the local socket, as `POSTGRES_USER`. Downtime grows with the
/// databases. A cluster that replicates moves with less by hooks of its own.
pub(super) fn postgresql() -> BTreeMap<HookName, Hook> {
    scripts([
        // The server that an image's first start initializes the cluster with listens on the socket alone.
        (HookName::Ready, r#"pg_isready -q -h 127.0.0.1 -p "$PODFERRY_PORT""#.to_owned()),
        (
            HookName::Export,
            r#"exec pg_dumpall -p "$PODFERRY_PORT" -U "${POSTGRES_USER:-postgres}" --clean --if-exists"#.to_owned(),
        ),
        (HookName::Import, POSTGRESQL_IMPORT.to_owned()),
    ])
}

/// The role that imports is there already, and cannot be removed by itself: it is left out, in front of the first database only, where no
/// line can be a row of a table.
const POSTGRESQL_IMPORT: &str = r#"
user=${POSTGRES_USER:-postgres}
sed -e "1,/^\\\\connect/{/^DROP ROLE IF EXISTS \"\\{0,1\\}$user\"\\{0,1\\};\$/d;/^CREATE ROLE \"\\{0,1\\}$user\"\\{0,1\\};\$/d;}" |
    psql -q -X -p "$PODFERRY_PORT" -U "$user" -d postgres -v ON_ERROR_STOP=1 -f - >/dev/null
"#;

fn scripts<const N: usize>(scripts: [(HookName, String); N]) -> BTreeMap<HookName, Hook> {
    scripts.into_iter().map(|(name, script)| (name, Hook::script(script))).collect()
}
