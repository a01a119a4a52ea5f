//! The stateful shopping cart, as a container's process 1. See [`podferry_workloads::cart`] for its interface.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use podferry_workloads::{
    cart::{CartService, DEFAULT_LOG, DEFAULT_TICK_MS, LOG_VARIABLE, TICK_VARIABLE},
    service::{self, AtEnd, ServiceError},
};

fn main() -> ExitCode {
    service::run("shopping-cart", shopping_cart)
}

async fn shopping_cart() -> Result<(), ServiceError> {
    let log = std::env::var_os(LOG_VARIABLE).map_or_else(|| PathBuf::from(DEFAULT_LOG), PathBuf::from);
    let tick = service::number_from_environment(TICK_VARIABLE, DEFAULT_TICK_MS, "give a number of milliseconds")?;
    let carts = CartService::open(&log)?;
    tokio::spawn(carts.clone().tick(Duration::from_millis(tick)));
    service::serve("shopping-cart", carts.router(), AtEnd::BreakOff).await
}
