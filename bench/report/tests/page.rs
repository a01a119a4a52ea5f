//! The report in headless Chromium, of results that are made up, or of those in the folder that `PODFERRY_RESULTS` names (which is then
//! written to). Run by `make e2e-report`, which installs the browser. `PODFERRY_SCREENSHOTS` names a folder for pictures of it.
#![expect(clippy::unwrap_used, reason = "a panic is the report")]

#[path = "../../../coordinator/tests/page/browser.rs"]
#[allow(dead_code, reason = "the coordinator's page is clicked through, too")]
mod browser;
#[path = "support/made_up.rs"]
mod made_up;

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use browser::Browser;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Width, height, and name.
const SIZES: [(u32, u32, &str); 3] = [(1280, 900, "desktop"), (360, 740, "phone"), (820, 1100, "tablet")];

fn report() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    if let Ok(results) = env::var("PODFERRY_RESULTS") {
        let page = podferry_report::report(&fs::canonicalize(results).unwrap()).unwrap();
        return (folder, page);
    }
    made_up::write(folder.path());
    let page = podferry_report::report(folder.path()).unwrap();
    (folder, page)
}

async fn open(browser: &mut Browser, page: &Path, size: (u32, u32), scheme: &str) {
    let (width, height) = size;
    let metrics = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500});
    browser.call("Emulation.setDeviceMetricsOverride", metrics).await;
    let features = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
    browser.call("Emulation.setEmulatedMedia", features).await;
    browser.call("Page.navigate", json!({"url": format!("file://{}", page.display())})).await;
    browser.until("document.readyState === 'complete' && document.querySelectorAll('section').length > 10").await;
}

/// Nothing was complained about, and nobody was asked but for the page itself.
fn assert_clean(browser: &Browser, page: &Path) {
    assert!(browser.faults().is_empty(), "{:#?}", browser.faults());
    let own = format!("file://{}", page.display());
    let foreign: Vec<_> =
        browser.requests().into_iter().filter(|url| *url != own && !url.starts_with("data:")).collect();
    assert!(foreign.is_empty(), "{foreign:?}");
}

async fn screenshot(browser: &mut Browser, name: &str) {
    let Ok(folder) = env::var("PODFERRY_SCREENSHOTS") else { return };
    let picture = browser.call("Page.captureScreenshot", json!({"captureBeyondViewport": true, "format": "png"})).await;
    fs::create_dir_all(&folder).unwrap();
    fs::write(format!("{folder}/{name}.png.base64"), picture["data"].as_str().unwrap()).unwrap();
}

#[tokio::test]
#[ignore = "needs headless Chromium: make e2e-report"]
async fn it_fits_every_screen_in_light_and_dark_and_asks_nobody() {
    let (_folder, page) = report();
    let mut browser = Browser::start().await;
    for scheme in ["light", "dark"] {
        for (width, height, name) in SIZES {
            open(&mut browser, &page, (width, height), scheme).await;
            browser.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)").await;
            let page_width = browser.evaluate("document.documentElement.scrollWidth").await;
            let shown = browser.evaluate("document.documentElement.clientWidth").await;
            assert_eq!(page_width, shown, "{name}: the page scrolls sideways");
            screenshot(&mut browser, &format!("{name}-{scheme}")).await;
        }
    }
    assert_clean(&browser, &page);
}

#[tokio::test]
#[ignore = "needs headless Chromium: make e2e-report"]
async fn figures_have_size_names_and_the_colours_of_the_scheme() {
    let (_folder, page) = report();
    let mut browser = Browser::start().await;
    let mut grounds = Vec::new();
    for scheme in ["light", "dark"] {
        open(&mut browser, &page, (1280, 900), scheme).await;
        browser.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)").await;
        let bad = "[...document.querySelectorAll('svg')].filter(svg => { const box = svg.getBoundingClientRect(); \
                   return box.width < 200 || box.height < 60 || !svg.getAttribute('aria-label') }).length";
        assert_eq!(browser.evaluate(bad).await, 0);
        let figures = browser.evaluate("document.querySelectorAll('figure svg').length").await;
        assert!(figures.as_u64().unwrap() > 5, "{figures}");
        // Text that has a colour of its own would not be seen on the other ground.
        let colours =
            "[...new Set([...document.querySelectorAll('svg text')].map(text => getComputedStyle(text).fill))]";
        let colours = browser.evaluate(colours).await;
        assert_eq!(colours.as_array().map(Vec::len), Some(1), "{colours}");
        grounds.push((colours, browser.evaluate("getComputedStyle(document.body).backgroundColor").await));
    }
    assert!(grounds[0].0 != grounds[1].0 && grounds[0].1 != grounds[1].1, "{grounds:?}");
    assert_clean(&browser, &page);
}

#[tokio::test]
#[ignore = "needs headless Chromium: make e2e-report"]
async fn a_section_is_reached_and_opened_by_keyboard() {
    let (_folder, page) = report();
    let mut browser = Browser::start().await;
    open(&mut browser, &page, (1280, 900), "light").await;
    browser.choose_by_keyboard("nav a[href='#peers']").await;
    browser.until("location.hash === '#peers'").await;
    browser
        .until("(top => top >= -5 && top < 700)(document.getElementById('peers').getBoundingClientRect().top)")
        .await;
    browser.call("Page.navigate", json!({"url": format!("file://{}", page.display())})).await;
    browser.until("document.readyState === 'complete'").await;
    browser.evaluate("document.querySelector('#guide details').open = false").await;
    browser.choose_by_keyboard("#guide > details > summary").await;
    browser.until("document.querySelector('#guide details').open").await;
}

#[tokio::test]
#[ignore = "needs headless Chromium: make e2e-report"]
async fn it_can_be_printed_with_everything_open() {
    let (_folder, page) = report();
    let mut browser = Browser::start().await;
    open(&mut browser, &page, (1280, 900), "light").await;
    let printed = browser.call("Page.printToPDF", json!({"printBackground": true})).await;
    assert!(printed["data"].as_str().unwrap().len() > 50_000);
    browser.call("Emulation.setEmulatedMedia", json!({"media": "print"})).await;
    let hidden = "[...document.querySelectorAll('details > *')].filter(each => !each.checkVisibility()).length";
    assert_eq!(browser.evaluate(hidden).await, Value::from(0));
}
