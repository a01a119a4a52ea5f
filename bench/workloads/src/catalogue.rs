//! A stateless product catalogue.
//!
//! | request | answer |
//! |---|---|
//! | `GET /products?offset=O&limit=L` | [`Page`] |
//! | `GET /products/{id}` | [`Product`] with an `ETag`; 304 when `If-None-Match` names it; 404 outside of `1..=`[`PRODUCTS`] |
//! | `GET /healthz` | `ok` |

use axum::{
    Json, Router,
    extract::{Path, Query},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::ballast::split_mix;

/// How many products there are; their ids are `1..=PRODUCTS`.
pub const PRODUCTS: u32 = 500;
/// The longest page that is given.
pub const MAX_PAGE: u32 = 100;

const ADJECTIVES: [&str; 8] = ["plain", "sturdy", "folding", "quiet", "bright", "woollen", "oak", "enamel"];
const NOUNS: [&str; 8] = ["kettle", "lamp", "chair", "bucket", "shelf", "blanket", "ladder", "clock"];

/// One product.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Product {
    /// `1..=PRODUCTS`.
    pub id: u32,
    /// What it is called.
    pub name: String,
    /// A few words about it.
    pub description: String,
    /// Price in cents.
    pub price_cents: u32,
    /// Weight in grams.
    pub weight_grams: u32,
}

/// A part of the list of products.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Page {
    /// How many products there are in all.
    pub total: u32,
    /// How many were left out before the first of `items`.
    pub offset: u32,
    /// The products, by ascending id.
    pub items: Vec<Product>,
}

/// Which part of the list is asked for.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct PageQuery {
    /// How many products to leave out; 0 when not given.
    #[serde(default)]
    pub offset: u32,
    /// How many to give; [`MAX_PAGE`] when not given, and never more.
    pub limit: Option<u32>,
}

/// The product with this id, the same in every process and on every node.
pub fn product(id: u32) -> Option<Product> {
    if !(1..=PRODUCTS).contains(&id) {
        return None;
    }
    let mut state = u64::from(id);
    let adjective = pick(&ADJECTIVES, &mut state);
    let noun = pick(&NOUNS, &mut state);
    let name = format!("{adjective} {noun} no. {id}");
    let description = format!("A {adjective} {noun}, item {id} of {PRODUCTS}, lot {:016x}.", split_mix(&mut state));
    Some(Product {
        id,
        name,
        description,
        price_cents: below(&mut state, 99_900) + 100,
        weight_grams: below(&mut state, 20_000) + 10,
    })
}

/// The part of the list that `query` asks for.
pub fn page(query: PageQuery) -> Page {
    let limit = query.limit.unwrap_or(MAX_PAGE).min(MAX_PAGE);
    let first = query.offset.saturating_add(1);
    let items = (first..=PRODUCTS).take(limit as usize).filter_map(product).collect();
    Page { total: PRODUCTS, offset: query.offset, items }
}

/// The `ETag` of a product: a strong validator, as the body follows from the product alone (RFC 9110, 8.8.3).
pub fn etag(product: &Product) -> String {
    let body = serde_json::to_vec(product).unwrap_or_default();
    format!("\"{:016x}\"", xxh3_64(&body))
}

/// The catalogue's routes.
pub fn router() -> Router {
    Router::new()
        .route("/products", get(async |Query(query): Query<PageQuery>| Json(page(query))))
        .route("/products/{id}", get(get_product))
        .route("/healthz", get(async || "ok"))
}

async fn get_product(Path(id): Path<u32>, headers: HeaderMap) -> Response {
    let Some(product) = product(id) else {
        return (StatusCode::NOT_FOUND, format!("there is no product {id}; ids are 1 to {PRODUCTS}\n")).into_response();
    };
    let etag = etag(&product);
    let known = headers.get(header::IF_NONE_MATCH).is_some_and(|value| value.as_bytes() == etag.as_bytes());
    if known {
        return (StatusCode::NOT_MODIFIED, [(header::ETAG, etag)]).into_response();
    }
    ([(header::ETAG, etag)], Json(product)).into_response()
}

/// A number in `0..bound`; the bias of the remainder does not matter for prices.
fn below(state: &mut u64, bound: u32) -> u32 {
    u32::try_from(split_mix(state) % u64::from(bound)).unwrap_or(0)
}

fn pick<'words>(words: &[&'words str; 8], state: &mut u64) -> &'words str {
    words[below(state, 8) as usize]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_exist_within_their_range_only() {
        assert_eq!(product(0), None);
        assert_eq!(product(PRODUCTS + 1), None);
        assert!((1..=PRODUCTS).all(|id| product(id).is_some_and(|product| product.id == id)));
    }

    #[test]
    fn every_product_has_its_own_etag() {
        let tags: std::collections::BTreeSet<_> =
            (1..=PRODUCTS).filter_map(product).map(|product| etag(&product)).collect();
        assert_eq!(tags.len(), PRODUCTS as usize);
    }

    #[test]
    fn pages_cover_the_list_without_gap_or_overlap() {
        let mut ids = Vec::new();
        for offset in (0..PRODUCTS + 60).step_by(60) {
            ids.extend(page(PageQuery { offset, limit: Some(60) }).items.iter().map(|product| product.id));
        }
        assert_eq!(ids, (1..=PRODUCTS).collect::<Vec<_>>());
        assert!(page(PageQuery { offset: u32::MAX, limit: None }).items.is_empty());
        assert_eq!(page(PageQuery { offset: 0, limit: Some(u32::MAX) }).items.len(), MAX_PAGE as usize);
    }
}
