//! The page in headless Chromium, against the real coordinator and its REST API, with agents whose containers are entries in a table.
//! Run by `make e2e-page`, which installs the browser.
#![expect(clippy::unwrap_used, reason = "a panic is the report")]

mod browser;
#[path = "../rest/client.rs"]
#[allow(dead_code, reason = "the page asks by itself")]
mod client;
#[path = "../world/mod.rs"]
mod world;

use std::sync::Arc;

use browser::Browser;
use client::Rest;
use podferry_common::identity::Peer;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use world::{Coordinator, Copy, Fault, World};

/// A world whose coordinator waits for what hangs, and the address at which a browser finds its page.
async fn stage() -> (World, Coordinator, String) {
    let world = World::new().await;
    let config = std::fs::read_to_string(world.configuration()).unwrap();
    let config = config.replace("precopy = 3", "precopy = 60").replace("prepare = 2", "prepare = 60");
    std::fs::write(world.configuration(), format!("rest_listen = \"127.0.0.1:0\"\n{config}")).unwrap();
    let (coordinator, _client) = world.coordinator().await;
    let files = world.identity(&Peer::client("tester").unwrap()).files().clone();
    let address = client::address(&coordinator.log.lock().unwrap());
    (world, coordinator, proxy(Rest::new(&address, &files, true)).await)
}

/// Shows the client's certificate for the browser, which cannot be given one without a hand: each connection is one to the coordinator.
async fn proxy(rest: Rest) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}/", listener.local_addr().unwrap());
    let rest = Arc::new(rest);
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            let rest = Arc::clone(&rest);
            tokio::spawn(async move {
                let mut tls = rest.connect().await.unwrap();
                let _broken = tokio::io::copy_bidirectional(&mut tcp, &mut tls).await;
            });
        }
    });
    address
}

async fn open(browser: &mut Browser, address: &str) {
    browser.call("Page.navigate", json!({"url": address})).await;
    browser.until("document.querySelectorAll('#nodes .card').length === 3").await;
    browser.until("document.querySelectorAll('#workloads .card').length === 2").await;
}

/// Nothing was complained about, and nobody else was asked.
fn assert_clean(browser: &Browser, address: &str) {
    // A watch that the page ends counts as a load that failed.
    let cancelled = |event: &&&Value| event["params"]["canceled"] != true;
    let faults: Vec<_> = browser.faults().into_iter().filter(|event| cancelled(&event)).collect();
    assert!(faults.is_empty(), "{faults:#?}");
    let foreign: Vec<_> =
        browser.requests().into_iter().filter(|url| !url.starts_with(address) && !url.starts_with("data:")).collect();
    assert!(foreign.is_empty(), "{foreign:?}");
}

const RUNNING: &str = "document.querySelector('#running [data-migration]')";
const MOVE_SHOP: &str = "[data-workload=shop] button";

#[tokio::test]
#[ignore = "needs headless Chromium: make e2e-page"]
async fn a_live_migration_is_started_followed_and_found_again_with_the_mouse() {
    let (world, _coordinator, address) = stage().await;
    let mut browser = Browser::start().await;
    open(&mut browser, &address).await;
    world.fault("a", "PreCopy", Fault::Hang, 1);
    browser.click(MOVE_SHOP).await;
    browser.until("document.getElementById('move').open").await;
    browser.evaluate("document.getElementById('move-target').value = 'b'").await;
    browser.evaluate("document.getElementById('move-strategy').value = 'live'").await;
    browser.click("#move-start").await;
    browser.until(&format!("{RUNNING}?.innerText.includes('precopy')")).await;
    browser.until(&format!("{RUNNING}.querySelectorAll('tbody tr').length === 1")).await;
    let card = browser.evaluate(&format!("{RUNNING}.innerText")).await;
    let card = card.as_str().unwrap();
    // The first round: 16000 pages in 9 ms, which would add 90 ms.
    for words in ["shop: a → b", "live", "62.5 MiB", "6.8 GiB/s", "a freeze would add 90 ms"] {
        assert!(card.contains(words), "{words:?} is missing in {card}");
    }
    world.heal("a", "PreCopy");
    browser.until("document.querySelector('#past [data-migration]')?.innerText.includes('succeeded')").await;
    browser.until("document.querySelector('[data-workload=shop]').innerText.includes('running on b')").await;
    let parts =
        browser.evaluate("[...document.querySelectorAll('#past .bar span')].map((part) => part.className)").await;
    assert_eq!(parts, json!(["before", "copy", "still", "after"]));
    assert_eq!(world.copy("b", "cart"), Some(Copy::Running));
    assert_clean(&browser, &address);
}

#[tokio::test]
#[ignore = "needs headless Chromium: make e2e-page"]
async fn on_a_dark_phone_a_migration_is_started_and_cancelled_by_keyboard() {
    let (world, _coordinator, address) = stage().await;
    let mut browser = Browser::start().await;
    let phone = json!({"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": true});
    browser.call("Emulation.setDeviceMetricsOverride", phone).await;
    let dark = json!({"features": [{"name": "prefers-color-scheme", "value": "dark"}]});
    browser.call("Emulation.setEmulatedMedia", dark).await;
    open(&mut browser, &address).await;
    let ground = browser.evaluate("getComputedStyle(document.body).backgroundColor").await;
    assert_eq!(ground, "rgb(20, 23, 27)");
    world.fault("b", "Prepare", Fault::Hang, 1);
    world.fault("c", "Prepare", Fault::Hang, 1);
    browser.choose_by_keyboard(MOVE_SHOP).await;
    browser.until("document.getElementById('move').open").await;
    browser.choose_by_keyboard("#move-start").await;
    browser.until(&format!("{RUNNING}?.innerText.includes('prepare')")).await;
    browser.until("!document.getElementById('move').open").await;
    assert_eq!(browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth").await, true, "it fits");
    // One that runs already is refused, and the page says so.
    browser.until(&format!("document.querySelector('{MOVE_SHOP}').disabled")).await;
    browser.choose_by_keyboard("#running [data-migration] button").await;
    browser.until("document.getElementById('cancel').open").await;
    browser.choose_by_keyboard("#cancel-start").await;
    browser.until(&format!("{RUNNING}?.innerText.includes('rolling back') || {RUNNING} === null")).await;
    world.heal("b", "Prepare");
    world.heal("c", "Prepare");
    browser.until("document.querySelector('#past [data-migration]')?.innerText.includes('cancelled')").await;
    let reason = browser.evaluate("document.querySelector('#past [data-migration]').innerText").await;
    assert!(reason.as_str().unwrap().contains("cancelled by client tester"), "{reason}");
    assert_eq!(world.copy("a", "cart"), Some(Copy::Running));
    assert_clean(&browser, &address);
}
