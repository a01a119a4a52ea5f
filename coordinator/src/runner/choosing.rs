//! Preflight of a migration whose strategy is still to be chosen: both agents are asked what they would say to each.
//!
//! The choice itself is [`crate::strategy::choose`]. It is made with the target's answer, so that it is on disk, with the state that this
//! answer leads to, before anything is prepared.

use std::collections::BTreeMap;
use std::sync::Arc;

use podferry_common::Failure;
use podferry_proto::v1::PreflightSourceResponse;

use super::calls::{Answer, Job};
use crate::cluster::{AgentClient, speaks};
use crate::strategy::{Auto, Choice, End, Goals, Obstacle, Strategy, View, Wishes, budget_ms, choose};

/// What the source says of itself and of the workload.
#[derive(Clone, Debug)]
pub(super) struct Survey {
    source: End,
    /// Of a workload that is dumped.
    carried: Result<Arc<PreflightSourceResponse>, Obstacle>,
    /// Of one that is stopped and started anew.
    restarted: Result<Arc<PreflightSourceResponse>, Obstacle>,
}

impl Default for Survey {
    fn default() -> Self {
        let unasked = || Obstacle { why: "the source was not asked".to_owned(), node: None, remedy: None };
        Self { source: End::default(), carried: Err(unasked()), restarted: Err(unasked()) }
    }
}

impl Survey {
    fn view<'a>(&'a self, target: Option<&'a End>, refused: &'a BTreeMap<Strategy, Obstacle>) -> View<'a> {
        let said = |answer: &'a Result<Arc<PreflightSourceResponse>, Obstacle>| {
            answer.as_ref().map(Arc::as_ref).map_err(Clone::clone)
        };
        View { source: &self.source, target, carried: said(&self.carried), restarted: said(&self.restarted), refused }
    }

    fn facts(&self, strategy: Strategy) -> Result<&Arc<PreflightSourceResponse>, &Obstacle> {
        if strategy == Strategy::Cold { self.restarted.as_ref() } else { self.carried.as_ref() }
    }
}

impl Job {
    /// Asks the source; an error when whatever the target says nothing could be chosen.
    pub(super) async fn survey_source(&self, auto: &Auto, client: AgentClient) -> Result<Answer, Failure> {
        let node = self.agents.describe(&self.node, &self.address).await?;
        speaks(&self.node, &node, self.least_wishes().of_source())?;
        let source = End::of(self.node.as_str(), &node);
        let unasked = |why: &str| Obstacle { why: why.to_owned(), node: None, remedy: None };
        let carried = if source.unfit.is_none() && auto.only_cold.is_none() {
            // What the source looks at is the same for all that dump.
            self.ask_source(client.clone(), Strategy::Warm).await?.map_err(Obstacle::from)
        } else {
            Err(unasked("it cannot be dumped"))
        };
        let restarted = if auto.allow_restart && source.cold {
            self.ask_source(client, Strategy::Cold).await?.map_err(Obstacle::from)
        } else {
            Err(unasked("it may not be restarted"))
        };
        let survey = Survey { source, carried, restarted };
        choose(&self.goals(auto), &survey.view(None, &BTreeMap::new()))?;
        Ok(Answer::Surveyed(Arc::new(survey)))
    }

    /// Chooses, and asks the target whether it can take the workload so; if not, what it refused is out, and so on.
    pub(super) async fn choose(&self, auto: &Auto, client: AgentClient) -> Result<Answer, Failure> {
        let node = self.agents.describe(&self.node, &self.address).await?;
        speaks(&self.node, &node, self.least_wishes().of_target())?;
        for facts in [&self.survey.carried, &self.survey.restarted].into_iter().flatten() {
            self.takes_volumes(&node, facts)?;
        }
        let (target, goals) = (End::of(self.node.as_str(), &node), self.goals(auto));
        let mut refused = BTreeMap::new();
        loop {
            let choice = choose(&goals, &self.survey.view(Some(&target), &refused))?;
            match self.ask_about(client.clone(), choice).await? {
                Ok(answer) => return Ok(answer),
                Err((strategy, failure)) => drop(refused.insert(strategy, failure.into())),
            }
        }
    }

    async fn ask_about(
        &self,
        client: AgentClient,
        choice: Choice,
    ) -> Result<Result<Answer, (Strategy, Failure)>, Failure> {
        let strategy = choice.strategy;
        let facts = self.survey.facts(strategy).map_err(|obstacle| {
            let message = format!("{strategy} was chosen, which the source cannot do: {}", obstacle.why);
            self.failure(podferry_common::FailureCode::Internal, message)
        })?;
        let answer = self.ask_target(client, strategy, facts).await?;
        let facts = Arc::clone(facts);
        Ok(answer.map(|findings| Answer::Chosen { choice, facts, findings }).map_err(|failure| (strategy, failure)))
    }

    fn goals(&self, auto: &Auto) -> Goals {
        Goals {
            auto: auto.clone(),
            budget_ms: budget_ms(self.downtime_budget_ms),
            bandwidth_limit: self.bandwidth_limit,
            verify: self.verify,
        }
    }

    /// What every strategy needs of the agents' versions.
    fn least_wishes(&self) -> Wishes {
        Wishes { strategy: Strategy::Warm, bandwidth_limit: self.bandwidth_limit }
    }
}
