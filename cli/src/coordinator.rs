//! The connection to the coordinator.

use std::future::Future;
use std::time::Duration;

use podferry_common::identity::{Identity, IdentityFiles, Peer};
use podferry_common::tls::{self, TlsError};
use podferry_common::{Failure, FailureCode};
use podferry_proto::Version;
use podferry_proto::v1::coordinator_service_client::CoordinatorServiceClient;
use podferry_proto::v1::{HelloRequest, Migration};
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use crate::arguments::Global;
use crate::exit;

/// How long the coordinator has for one answer. It answers from its record: an agent that hangs does not delay it long.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// A coordinator that has proved to be one and speaks our protocol.
pub(crate) type Coordinator = CoordinatorServiceClient<Channel>;

/// Connects, with the certificate and to the address that the flags name.
pub(crate) async fn connect(flags: &Global) -> Result<Coordinator, Failure> {
    let address = flags.coordinator.as_deref().ok_or_else(|| {
        Failure::new(FailureCode::InvalidArgument, "no coordinator is named")
            .remedy("give --coordinator HOST:PORT, or set PODFERRY_COORDINATOR")
    })?;
    let folder = flags.identity.as_deref().ok_or_else(|| {
        Failure::new(FailureCode::InvalidArgument, "no identity is given")
            .remedy("give --identity DIR with ca.pem, cert.pem and key.pem, or set PODFERRY_IDENTITY")
    })?;
    let identity = Identity::load(IdentityFiles::in_folder(folder)).map_err(|error| {
        Failure::from_error(FailureCode::InvalidArgument, &error).remedy("have a client certificate issued")
    })?;
    let channel = tls::connect(address, &identity, &Peer::Coordinator).await.map_err(|error| unreachable(&error))?;
    let mut coordinator = CoordinatorServiceClient::new(channel);
    match greet(&mut coordinator).await {
        Ok(()) => Ok(coordinator),
        Err(Greeting::Answered(failure)) => Err(failure),
        Err(Greeting::Broken(status)) => Err(match tls::refusal(address, &identity, &Peer::Coordinator).await {
            Some(reason) => distrusted(Failure::from_error(FailureCode::Unavailable, &reason)),
            None => distrusted(Failure { code: FailureCode::Unavailable, ..Failure::from_status(&status) }),
        }),
    }
}

fn unreachable(error: &TlsError) -> Failure {
    match error {
        TlsError::Address { .. } => Failure::from_error(FailureCode::InvalidArgument, error),
        _ => Failure::from_error(FailureCode::Unavailable, error).remedy(
            "see that the coordinator runs there, and that both certificates are of the same authority and valid",
        ),
    }
}

/// Why there was no handshake.
enum Greeting {
    /// The coordinator's own answer, or our judgement of it.
    Answered(Failure),
    /// The connection broke. A coordinator that does not trust our certificate breaks it here at the latest.
    Broken(Status),
}

fn distrusted(failure: Failure) -> Failure {
    failure.remedy("see that the coordinator trusts this client's certificate, and that it has not expired")
}

/// The versioned handshake.
async fn greet(coordinator: &mut Coordinator) -> Result<(), Greeting> {
    let request = HelloRequest { version: Some(Version::OURS.into()) };
    let hello = match tokio::time::timeout(ANSWER_TIMEOUT, coordinator.hello(request)).await {
        Ok(Ok(hello)) => hello.into_inner(),
        Ok(Err(status)) if is_broken(&status) => return Err(Greeting::Broken(status)),
        Ok(Err(status)) => return Err(Greeting::Answered(Failure::from_status(&status))),
        Err(_) => return Err(Greeting::Answered(silent())),
    };
    match Version::OURS.agree(hello.version.as_ref()) {
        Ok(_) => Ok(()),
        Err(mismatch) => Err(Greeting::Answered(Failure::from_error(FailureCode::FailedPrecondition, &mismatch))),
    }
}

/// Whether the status means that the connection broke, not that the coordinator said no: its own answers carry details.
pub(crate) fn is_broken(status: &Status) -> bool {
    status.code() == Code::Unavailable && !exit::is_of_a_node(&Failure::from_status(status))
        || status.details().is_empty() && matches!(status.code(), Code::Unknown | Code::Internal | Code::Cancelled)
}

fn silent() -> Failure {
    let text = format!("the coordinator did not answer in {} s", ANSWER_TIMEOUT.as_secs());
    Failure::new(FailureCode::DeadlineExceeded, text)
}

/// Waits for an answer, in bounded time.
pub(crate) async fn answer<T>(call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Failure> {
    match tokio::time::timeout(ANSWER_TIMEOUT, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) if is_broken(&status) => {
            Err(Failure { code: FailureCode::Unavailable, ..Failure::from_status(&status) })
        }
        Ok(Err(status)) => Err(Failure::from_status(&status)),
        Err(_) => Err(silent()),
    }
}

/// The migration of an answer that must have one.
pub(crate) fn present(migration: Option<Migration>) -> Result<Migration, Failure> {
    migration.ok_or_else(|| Failure::new(FailureCode::Internal, "the coordinator's answer has no migration"))
}
