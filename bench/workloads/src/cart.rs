//! A stateful shopping cart.
//!
//! | request | answer |
//! |---|---|
//! | `PUT /carts/{id}/operations/{n}` with an [`Operation`] | [`Answer`]; 409 with a [`Refusal`] when `n` is not next |
//! | `GET /carts/{id}` | [`Cart`](crate::shop::Cart) |
//! | `GET /orders?cart=ID` | the [`LoggedOrder`]s as memory holds them |
//! | `GET /orders/log?cart=ID` | [`LogReport`], read anew from the file |
//! | `GET /feed` | server-sent events, each a [`Tick`] with its number as `id`, for as long as the connection lives |
//! | `GET /state` | a [`ShopState`]: carts and orders, for another instance |
//! | `PUT /state` with one | 204 when it is taken and its orders are on disk; 409 unless this instance is new |
//! | `GET /healthz` | `ok` |

use std::{
    convert::Infallible,
    path::{Path as FilePath, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, Path, Query, State},
    http::StatusCode,
    response::{
        IntoResponse, Response, Sse,
        sse::{Event, KeepAlive},
    },
    routing::{get, put},
};
use futures::{Stream, StreamExt};
use serde::{Deserialize, Serialize};
use tokio::{sync::broadcast, time::MissedTickBehavior};
use tokio_stream::wrappers::BroadcastStream;

use crate::{
    order_log::{self, LogError, LoggedOrder, OrderLog},
    shop::{Answer, Operation, Refusal, Shop, ShopState, Step},
};

/// The environment variable that names the order log.
pub const LOG_VARIABLE: &str = "ORDER_LOG";
/// Where the order log is otherwise: in the container's writable layer.
pub const DEFAULT_LOG: &str = "/data/orders.log";
/// The environment variable that gives the time between two ticks of the feed, in ms.
pub const TICK_VARIABLE: &str = "TICK_MS";
/// That time otherwise, in ms.
pub const DEFAULT_TICK_MS: u64 = 5;
/// How many ticks a slow reader of the feed can be behind before it loses some (and is told so).
const FEED_BACKLOG: usize = 4096;
/// The most bytes of a state that is taken.
const LARGEST_STATE: usize = 1 << 30;
/// The name of the event that says how many ticks were lost.
pub const LOST_EVENT: &str = "lost";

/// One event of the feed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tick {
    /// Counts from 1 for as long as the process lives, whatever node it is on; every reader sees every number.
    pub tick: u64,
    /// Orders so far.
    pub orders: u64,
}

/// What the log file holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogReport {
    /// Number of the last order in the file; 0 when there is none.
    pub last_sequence: u64,
    /// Its checksum, which covers the whole file.
    pub last_checksum: u64,
    /// The orders, of one cart or of all.
    pub orders: Vec<LoggedOrder>,
}

/// Which cart's orders are asked for.
#[derive(Debug, Clone, Deserialize)]
pub struct OrdersQuery {
    /// The cart; all when not given.
    pub cart: Option<String>,
}

#[derive(Debug)]
struct Inner {
    shop: Mutex<Shop>,
    // Held while the disk is waited for; never taken while `shop` is held.
    log: Mutex<OrderLog>,
    log_path: PathBuf,
    feed: broadcast::Sender<Tick>,
}

/// The service's state, shared by all requests.
#[derive(Debug, Clone)]
pub struct CartService(Arc<Inner>);

impl CartService {
    /// Opens the order log and goes on after its last order.
    pub fn open(log_path: &FilePath) -> Result<Self, LogError> {
        let (log, orders) = OrderLog::open(log_path)?;
        tracing::info!(path = %log_path.display(), orders = orders.len(), "order log opened");
        let inner = Inner {
            shop: Mutex::new(Shop::new(orders)),
            log: Mutex::new(log),
            log_path: log_path.to_owned(),
            feed: broadcast::channel(FEED_BACKLOG).0,
        };
        Ok(Self(Arc::new(inner)))
    }

    /// Ticks for ever. Ticks that a pause of the process made impossible are not made up for: the counter counts ticks.
    pub async fn tick(self, every: Duration) -> Infallible {
        let mut clock = tokio::time::interval(every.max(Duration::from_millis(1)));
        clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut tick = 0;
        loop {
            clock.tick().await;
            tick += 1;
            let orders = lock(&self.0.shop).order_count();
            // Nobody listening is no error.
            let _ = self.0.feed.send(Tick { tick, orders });
        }
    }

    /// The service's routes.
    pub fn router(self) -> Router {
        Router::new()
            .route("/carts/{id}/operations/{sequence}", put(operate))
            .route("/carts/{id}", get(get_cart))
            .route("/orders", get(get_orders))
            .route("/orders/log", get(get_log))
            .route("/feed", get(feed))
            .route("/state", get(get_state).put(put_state).layer(DefaultBodyLimit::max(LARGEST_STATE)))
            .route("/healthz", get(async || "ok"))
            .with_state(self)
    }

    /// Carries out an operation; waits for the disk when it is an order.
    fn operate(&self, cart: &str, sequence: u64, operation: Operation) -> Result<Answer, Failure> {
        if operation != Operation::Order {
            return match lock(&self.0.shop).operate(cart, sequence, operation)? {
                Step::Done(answer) => Ok(answer),
                Step::Write(order) => Err(Failure::Log(format!("unexpected order {order:?}"))),
            };
        }
        let mut log = lock(&self.0.log);
        let order = match lock(&self.0.shop).operate(cart, sequence, operation)? {
            Step::Done(answer) => return Ok(answer),
            Step::Write(order) => order,
        };
        match log.append(order) {
            Ok(logged) => Ok(lock(&self.0.shop).ordered(logged)),
            Err(error) => {
                lock(&self.0.shop).order_failed(cart);
                Err(error.into())
            }
        }
    }

    /// All carts and orders as they are at one instant.
    fn state(&self) -> ShopState {
        // No order is being written as long as this is held.
        let _log = lock(&self.0.log);
        lock(&self.0.shop).state()
    }

    /// Goes on where another instance is; waits for the disk.
    fn adopt(&self, state: ShopState) -> Result<(), Failure> {
        let mut log = lock(&self.0.log);
        let mut shop = lock(&self.0.shop);
        if !shop.is_new() {
            return Err(Failure::Refused(Refusal::Busy));
        }
        for order in &state.orders {
            if log.append(order.order.clone())? != *order {
                return Err(Failure::Log(format!("order {} does not follow from those before", order.sequence)));
            }
        }
        *shop = Shop::from_state(state);
        Ok(())
    }

    fn read_log(&self, cart: Option<&str>) -> Result<LogReport, Failure> {
        // Under the lock, so that no half-written line is seen.
        let _log = lock(&self.0.log);
        let mut orders = order_log::read(&self.0.log_path)?;
        let (last_sequence, last_checksum) = orders.last().map_or((0, 0), |last| (last.sequence, last.checksum));
        orders.retain(|logged| cart.is_none_or(|cart| logged.order.cart == cart));
        Ok(LogReport { last_sequence, last_checksum, orders })
    }
}

/// A panic while the lock was held is no reason to refuse all further requests: each step leaves the data whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a request was not answered as asked.
#[derive(Debug)]
enum Failure {
    Refused(Refusal),
    Log(String),
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<LogError> for Failure {
    fn from(error: LogError) -> Self {
        Self::Log(error.to_string())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        match self {
            Self::Refused(refusal @ Refusal::Invalid { .. }) => {
                (StatusCode::UNPROCESSABLE_ENTITY, Json(refusal)).into_response()
            }
            Self::Refused(refusal) => (StatusCode::CONFLICT, Json(refusal)).into_response(),
            Self::Log(problem) => {
                tracing::error!("{problem}");
                (StatusCode::INTERNAL_SERVER_ERROR, problem).into_response()
            }
        }
    }
}

/// Runs what waits for the disk where waiting hinders nobody. It runs to its end even when the client goes away.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Failure> + Send + 'static) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(Failure::Log(error.to_string())))
}

async fn operate(
    State(service): State<CartService>,
    Path((cart, sequence)): Path<(String, u64)>,
    Json(operation): Json<Operation>,
) -> Result<Json<Answer>, Failure> {
    let answer = if operation == Operation::Order {
        blocking(move || service.operate(&cart, sequence, operation)).await?
    } else {
        service.operate(&cart, sequence, operation)?
    };
    Ok(Json(answer))
}

async fn get_cart(State(service): State<CartService>, Path(cart): Path<String>) -> Response {
    Json(lock(&service.0.shop).cart(&cart)).into_response()
}

async fn get_orders(State(service): State<CartService>, Query(query): Query<OrdersQuery>) -> Json<Vec<LoggedOrder>> {
    Json(lock(&service.0.shop).orders(query.cart.as_deref()))
}

async fn get_log(
    State(service): State<CartService>,
    Query(query): Query<OrdersQuery>,
) -> Result<Json<LogReport>, Failure> {
    blocking(move || service.read_log(query.cart.as_deref())).await.map(Json)
}

async fn get_state(State(service): State<CartService>) -> Result<Json<ShopState>, Failure> {
    blocking(move || Ok(service.state())).await.map(Json)
}

async fn put_state(State(service): State<CartService>, body: Bytes) -> Result<StatusCode, Failure> {
    let state = serde_json::from_slice(&body)
        .map_err(|error| Failure::Refused(Refusal::Invalid { reason: format!("this is no state: {error}") }))?;
    blocking(move || service.adopt(state)).await.map(|()| StatusCode::NO_CONTENT)
}

async fn feed(State(service): State<CartService>) -> Sse<impl Stream<Item = Result<Event, axum::Error>>> {
    let events = BroadcastStream::new(service.0.feed.subscribe()).map(|received| match received {
        Ok(tick) => Event::default().id(tick.tick.to_string()).json_data(tick),
        // The reader was slower than the backlog is long: it is told, so that it does not take it for a loss on the way.
        Err(lagged) => Ok(Event::default().event(LOST_EVENT).data(lagged.to_string())),
    });
    Sse::new(events).keep_alive(KeepAlive::default())
}
