//! Reads products; knows every one of them beforehand.

use std::net::SocketAddr;

use http::{Method, StatusCode, header};
use hyper::body::Bytes;
use podferry_workloads::{
    ballast::split_mix,
    catalogue::{self, PRODUCTS, Page, PageQuery, Product},
};

use super::{
    Client, Fault,
    connection::{Connection, Reply},
};

const PAGE: u32 = 20;

#[derive(Debug)]
pub(super) struct CatalogueClient {
    target: SocketAddr,
    connection: Option<Connection>,
    random: u64,
}

impl CatalogueClient {
    pub(super) fn new(target: SocketAddr, number: u32) -> Self {
        Self { target, connection: None, random: u64::from(number) }
    }

    fn id(&mut self) -> u32 {
        u32::try_from(split_mix(&mut self.random) % u64::from(PRODUCTS)).unwrap_or(0) + 1
    }

    async fn ask(&mut self, path: &str, headers: &[(header::HeaderName, String)]) -> Result<Reply, Fault> {
        let connection = self.connection.as_mut().ok_or_else(|| Fault::Broken("not connected".to_owned()))?;
        connection.ask(Method::GET, path, headers, Bytes::new()).await
    }

    async fn product(&mut self) -> Result<(), Fault> {
        let id = self.id();
        let path = format!("/products/{id}");
        let reply = self.ask(&path, &[]).await?;
        let expected = catalogue::product(id);
        let tag = expected.as_ref().map(catalogue::etag);
        let tag_came = reply.headers.get(header::ETAG).and_then(|value| value.to_str().ok());
        if reply.status != StatusCode::OK || tag_came != tag.as_deref() {
            return Err(reply.unexpected(&path));
        }
        let product: Product = reply.json(&path)?;
        if Some(product) == expected { Ok(()) } else { Err(reply.unexpected(&path)) }
    }

    async fn known_product(&mut self) -> Result<(), Fault> {
        let id = self.id();
        let path = format!("/products/{id}");
        let tag = catalogue::product(id).as_ref().map(catalogue::etag).unwrap_or_default();
        let reply = self.ask(&path, &[(header::IF_NONE_MATCH, tag)]).await?;
        if reply.status == StatusCode::NOT_MODIFIED { Ok(()) } else { Err(reply.unexpected(&path)) }
    }

    async fn page(&mut self) -> Result<(), Fault> {
        let offset = self.id() - 1;
        let path = format!("/products?offset={offset}&limit={PAGE}");
        let reply = self.ask(&path, &[]).await?;
        let expected = catalogue::page(PageQuery { offset, limit: Some(PAGE) });
        if reply.status == StatusCode::OK && reply.json::<Page>(&path)? == expected {
            Ok(())
        } else {
            Err(reply.unexpected(&path))
        }
    }
}

impl Client for CatalogueClient {
    async fn connect(&mut self) -> Result<(), Fault> {
        self.connection = Some(Connection::open(self.target).await?);
        Ok(())
    }

    async fn step(&mut self) -> Result<(), Fault> {
        match split_mix(&mut self.random) % 8 {
            0 => self.page().await,
            1 => self.known_product().await,
            _ => self.product().await,
        }
    }

    async fn finish(&mut self) -> Vec<Fault> {
        Vec::new()
    }
}
