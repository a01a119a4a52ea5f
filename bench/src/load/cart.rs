//! Fills, empties and orders one cart, keeping a copy of what it has to be.

use std::{
    net::SocketAddr,
    time::{SystemTime, UNIX_EPOCH},
};

use http::{Method, StatusCode, header};
use hyper::body::Bytes;
use podferry_workloads::{
    ballast::split_mix,
    cart::LogReport,
    catalogue::PRODUCTS,
    order_log::LoggedOrder,
    shop::{Answer, Cart, Items, Operation, Refusal},
};

use super::{Client, Fault, connection::Connection};

/// One operation in so many is an order.
const ORDER_EVERY: u64 = 40;
/// One step in so many reads the cart instead of changing it.
const READ_EVERY: u64 = 8;

#[derive(Debug)]
pub(super) struct CartClient {
    target: SocketAddr,
    connection: Option<Connection>,
    name: String,
    random: u64,
    /// What the cart has to be, by all answers so far.
    model: Cart,
    /// The operation whose answer is not known yet; sent again when the connection broke.
    pending: Option<Operation>,
    orders: Vec<LoggedOrder>,
}

impl CartClient {
    pub(super) fn new(target: SocketAddr, number: u32) -> Self {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        Self {
            target,
            connection: None,
            name: format!("cart-{number}-{started}"),
            random: u64::from(number),
            model: Cart::default(),
            pending: None,
            orders: Vec::new(),
        }
    }

    fn connection(&mut self) -> Result<&mut Connection, Fault> {
        self.connection.as_mut().ok_or_else(|| Fault::Broken("not connected".to_owned()))
    }

    fn choose(&mut self) -> Operation {
        let choice = split_mix(&mut self.random);
        let product = u32::try_from(choice % u64::from(PRODUCTS)).unwrap_or(0) + 1;
        let count = u32::try_from(choice >> 62).unwrap_or(0) + 1;
        let held = self.model.items.keys().copied().next();
        match held {
            Some(_) if self.model.sequence % ORDER_EVERY == ORDER_EVERY - 1 => Operation::Order,
            Some(held) if choice & 0x300 == 0 => Operation::Remove { product: held, count },
            _ => Operation::Add { product, count },
        }
    }

    async fn operate(&mut self) -> Result<(), Fault> {
        let operation = match self.pending {
            Some(operation) => operation,
            None => self.choose(),
        };
        self.pending = Some(operation);
        let path = format!("/carts/{}/operations/{}", self.name, self.model.sequence + 1);
        let body = serde_json::to_vec(&operation).map_err(|error| Fault::Wrong(error.to_string()))?;
        let json = [(header::CONTENT_TYPE, "application/json".to_owned())];
        let reply = self.connection()?.ask(Method::PUT, &path, &json, Bytes::from(body)).await?;
        match reply.status {
            StatusCode::OK => self.compare(operation, reply.json(&path)?),
            StatusCode::CONFLICT => match reply.json(&path)? {
                Refusal::Busy => Ok(()),
                Refusal::Sequence { last, .. } => self.adopt(last).await,
                Refusal::Different { .. } | Refusal::Invalid { .. } => Err(reply.unexpected(&path)),
            },
            _ => Err(reply.unexpected(&path)),
        }
    }

    /// Compares the answer with what it has to be, and goes on from the answer.
    fn compare(&mut self, operation: Operation, answer: Answer) -> Result<(), Fault> {
        self.pending = None;
        let mut expected = self.model.clone();
        let ordered = std::mem::take(&mut expected.items);
        expected.items.clone_from(&ordered);
        expected.apply(operation);
        self.model = answer.cart;
        let lost = distance(&expected.items, &self.model.items) + expected.sequence.abs_diff(self.model.sequence);
        if lost > 0 {
            return Err(lost_items(lost, &format!("cart {expected:?} came as {:?}", self.model)));
        }
        let Some(order) = answer.order else {
            return if operation == Operation::Order {
                Err(lost_items(1, "an order without its entry"))
            } else {
                Ok(())
            };
        };
        let lost = distance(&ordered, &order.order.items);
        self.orders.push(order);
        if lost > 0 { Err(lost_items(lost, "an order with other items than the cart had")) } else { Ok(()) }
    }

    /// The service's cart is at another operation than it has to be: all between is lost. Goes on from there.
    async fn adopt(&mut self, last: u64) -> Result<(), Fault> {
        self.pending = None;
        let path = format!("/carts/{}", self.name);
        let cart: Cart = self.connection()?.get(&path).await?;
        let items = last.abs_diff(self.model.sequence).max(distance(&self.model.items, &cart.items)).max(1);
        let what = format!("cart at operation {last} instead of {}", self.model.sequence);
        self.model = cart;
        Err(lost_items(items, &what))
    }

    async fn read(&mut self) -> Result<(), Fault> {
        let path = format!("/carts/{}", self.name);
        let cart: Cart = self.connection()?.get(&path).await?;
        let lost = distance(&self.model.items, &cart.items) + self.model.sequence.abs_diff(cart.sequence);
        if lost > 0 {
            let what = format!("cart {:?} is {cart:?}", self.model);
            self.model = cart;
            return Err(lost_items(lost, &what));
        }
        Ok(())
    }

    async fn check_orders(&mut self) -> Result<(), Fault> {
        let path = format!("/orders?cart={}", self.name);
        let held: Vec<LoggedOrder> = self.connection()?.get(&path).await?;
        compare_orders("memory", &self.orders, &held)
    }

    async fn check_log(&mut self) -> Result<(), Fault> {
        let path = format!("/orders/log?cart={}", self.name);
        let log: LogReport = self.connection()?.get(&path).await?;
        compare_orders("the order log", &self.orders, &log.orders)
    }
}

fn lost_items(items: u64, what: &str) -> Fault {
    Fault::Lost { items, what: what.to_owned() }
}

/// By how many items two carts differ.
fn distance(one: &Items, two: &Items) -> u64 {
    let count = |items: &Items, product: &u32| items.get(product).copied().unwrap_or(0);
    let products: std::collections::BTreeSet<&u32> = one.keys().chain(two.keys()).collect();
    products.into_iter().map(|product| u64::from(count(one, product).abs_diff(count(two, product)))).sum()
}

/// Every confirmed order has to be there once, in order, and no other.
fn compare_orders(place: &str, confirmed: &[LoggedOrder], found: &[LoggedOrder]) -> Result<(), Fault> {
    if confirmed == found {
        return Ok(());
    }
    let missing = confirmed.iter().filter(|order| !found.contains(order)).count();
    let (confirmed, found) = (confirmed.len(), found.len());
    let surplus = (found + missing).saturating_sub(confirmed);
    let items = (missing + surplus).max(1) as u64;
    Err(Fault::Lost {
        items,
        what: format!("{confirmed} orders were confirmed, {place} has {found}, {missing} missing"),
    })
}

impl Client for CartClient {
    async fn connect(&mut self) -> Result<(), Fault> {
        self.connection = Some(Connection::open(self.target).await?);
        Ok(())
    }

    async fn step(&mut self) -> Result<(), Fault> {
        if self.pending.is_none() && split_mix(&mut self.random).is_multiple_of(READ_EVERY) {
            return self.read().await;
        }
        self.operate().await
    }

    fn retries(&self) -> bool {
        self.pending.is_some()
    }

    async fn finish(&mut self) -> Vec<Fault> {
        let mut faults = Vec::new();
        if self.pending.is_some() {
            faults.extend(self.operate().await.err());
        }
        faults.extend(self.read().await.err());
        faults.extend(self.check_orders().await.err());
        faults.extend(self.check_log().await.err());
        faults
    }
}

#[cfg(test)]
mod tests {
    use podferry_workloads::order_log::Order;

    use super::*;

    fn client() -> CartClient {
        CartClient::new(SocketAddr::from(([127, 0, 0, 1], 1)), 0)
    }

    fn cart(sequence: u64, items: &[(u32, u32)]) -> Cart {
        Cart { sequence, items: items.iter().copied().collect() }
    }

    fn answer(cart: Cart) -> Answer {
        Answer { cart, replayed: false, order: None }
    }

    fn logged(sequence: u64) -> LoggedOrder {
        let order = Order { cart: "a".to_owned(), cart_sequence: sequence, items: [(1, 1)].into() };
        LoggedOrder { sequence, checksum: sequence, order }
    }

    const ADD: Operation = Operation::Add { product: 1, count: 2 };

    #[test]
    fn a_right_answer_is_accepted_replayed_or_not() {
        let mut client = client();
        assert_eq!(client.compare(ADD, answer(cart(1, &[(1, 2)]))), Ok(()));
        assert_eq!(client.compare(ADD, Answer { replayed: true, ..answer(cart(2, &[(1, 4)])) }), Ok(()));
    }

    #[test]
    fn a_lost_and_a_doubled_item_are_counted_once() {
        let mut client = client();
        assert!(matches!(client.compare(ADD, answer(cart(1, &[(1, 1)]))), Err(Fault::Lost { items: 1, .. })));
        assert!(matches!(client.compare(ADD, answer(cart(2, &[(1, 5)]))), Err(Fault::Lost { items: 2, .. })));
        assert_eq!(client.compare(ADD, answer(cart(3, &[(1, 7)]))), Ok(()));
    }

    #[test]
    fn an_order_has_to_hold_what_was_in_the_cart() {
        let mut client = client();
        client.compare(ADD, answer(cart(1, &[(1, 2)]))).unwrap();
        let mut order = logged(1);
        order.order.items = [(1, 1)].into();
        let came = Answer { order: Some(order), ..answer(cart(2, &[])) };
        assert!(matches!(client.compare(Operation::Order, came), Err(Fault::Lost { items: 1, .. })));
    }

    #[test]
    fn missing_and_surplus_orders_are_counted() {
        let all = [logged(1), logged(2), logged(3)];
        let lost = |found: &[LoggedOrder]| match compare_orders("x", &all, found) {
            Ok(()) => 0,
            Err(Fault::Lost { items, .. }) => items,
            Err(other) => panic!("{other:?}"),
        };
        assert_eq!(lost(&all), 0);
        assert_eq!(lost(&[logged(1), logged(3)]), 1);
        assert_eq!(lost(&[logged(1), logged(2), logged(3), logged(3)]), 1);
        assert_eq!(lost(&[logged(1), logged(3), logged(3)]), 2);
        assert_eq!(lost(&[logged(1), logged(3), logged(2)]), 1);
    }

    #[test]
    fn chosen_operations_are_always_possible() {
        let mut client = client();
        let mut orders = 0;
        for _ in 0..2000 {
            let operation = client.choose();
            client.model.check(operation).unwrap();
            orders += u32::from(operation == Operation::Order);
            client.model.apply(operation);
        }
        assert!(orders >= 40, "{orders}");
    }
}
