//! Which strategies pay on a node, by what its agent says of it.

/// The strategies that pay on a node, by their names: what it takes part in, without those that its agent or its kernel has nothing for. `fit`
/// and `features` are the agent's words ([`crate::v1::Node`]).
pub fn offered(fit: bool, features: &[String]) -> Vec<&'static str> {
    let has = |feature: &str| features.iter().any(|name| name == feature);
    let (tracks, post_copy) = (has("kernel:write_tracking"), has("agent:post_copy"));
    let all = [
        ("cold", has("agent:cold")),
        ("warm", fit),
        ("live", fit && tracks),
        ("postcopy", fit && post_copy),
        ("hybrid", fit && tracks && post_copy),
        ("application", has("agent:application")),
    ];
    all.into_iter().filter(|(_, can)| *can).map(|(name, _)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strategy_pays_where_agent_and_kernel_have_what_it_needs() {
        let of = |fit, features: &[&str]| {
            let features: Vec<_> = features.iter().map(|&word| word.to_owned()).collect();
            offered(fit, &features).join(" ")
        };
        let all = ["kernel:write_tracking", "agent:post_copy", "agent:cold", "agent:application"];
        assert_eq!(of(true, &all), "cold warm live postcopy hybrid application");
        assert_eq!(of(false, &all), "cold application");
        assert_eq!(of(true, &["agent:post_copy"]), "warm postcopy");
        assert_eq!(of(true, &[]), "warm");
    }
}
