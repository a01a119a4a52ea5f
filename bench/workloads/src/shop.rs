//! The carts, as data: no clock, no I/O.
//!
//! A client numbers the operations on its cart from 1. Operation `n + 1` is carried out when `n` was the last; `n` again
//! is answered with what it was answered the first time and changes nothing; any other number is refused. A client that
//! does not know whether an operation arrived can thus send it again, and one that was lost or done twice shows.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    catalogue,
    order_log::{LoggedOrder, Order},
};

/// How many of each product, by product id; never zero.
pub type Items = BTreeMap<u32, u32>;

/// How many carts there can be: clients name them, and memory is not without end.
pub const MAX_CARTS: usize = 100_000;
/// How many of one product a cart holds at most.
pub const MAX_COUNT: u32 = 1_000_000;

/// What a client wants done with its cart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Operation {
    /// Put `count` of a product into it.
    Add {
        /// The product's id in the catalogue.
        product: u32,
        /// How many, at least 1.
        count: u32,
    },
    /// Take up to `count` of a product out of it.
    Remove {
        /// The product's id in the catalogue.
        product: u32,
        /// How many; all when there are fewer.
        count: u32,
    },
    /// Order what is in it, which empties it.
    Order,
}

/// A cart as a client sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cart {
    /// Number of the last operation that was carried out; 0 for a new cart.
    pub sequence: u64,
    /// What is in it.
    pub items: Items,
}

/// The answer to an operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The cart after the operation.
    pub cart: Cart,
    /// Whether this operation had been carried out before, and this is only its answer again.
    pub replayed: bool,
    /// The order as it was logged, when the operation was one.
    pub order: Option<LoggedOrder>,
}

/// Why an operation was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
#[serde(tag = "refusal", rename_all = "snake_case")]
pub enum Refusal {
    /// The number is neither the next one nor the last one.
    #[error("operation {given} on a cart whose last one was {last}: send {}", last + 1)]
    Sequence {
        /// Number of the last operation carried out.
        last: u64,
        /// The number that came.
        given: u64,
    },
    /// The same number came with another operation.
    #[error("operation {given} was carried out before as another one: number operations anew for each")]
    Different {
        /// The number that came.
        given: u64,
    },
    /// An order of this cart is being written to disk.
    #[error("an order of this cart is being written: ask again")]
    Busy,
    /// The operation makes no sense.
    #[error("{reason}")]
    Invalid {
        /// What is wrong with it.
        reason: String,
    },
}

impl Cart {
    /// Carries out the operation, except for writing the order down.
    pub fn apply(&mut self, operation: Operation) {
        self.sequence += 1;
        match operation {
            Operation::Add { product, count } => {
                let held = self.items.entry(product).or_insert(0);
                *held = held.saturating_add(count).min(MAX_COUNT);
            }
            Operation::Remove { product, count } => {
                if let Some(held) = self.items.get_mut(&product) {
                    *held = held.saturating_sub(count);
                }
                self.items.retain(|_, held| *held > 0);
            }
            Operation::Order => self.items.clear(),
        }
    }

    /// Whether the operation can be carried out on this cart.
    pub fn check(&self, operation: Operation) -> Result<(), Refusal> {
        let invalid = |reason: String| Err(Refusal::Invalid { reason });
        match operation {
            Operation::Add { product, count } | Operation::Remove { product, count } => {
                if catalogue::product(product).is_none() {
                    return invalid(format!("there is no product {product}; ids are 1 to {}", catalogue::PRODUCTS));
                }
                if !(1..=MAX_COUNT).contains(&count) {
                    return invalid(format!("count {count} is not within 1 to {MAX_COUNT}"));
                }
                Ok(())
            }
            Operation::Order if self.items.is_empty() => invalid("an empty cart cannot be ordered".to_owned()),
            Operation::Order => Ok(()),
        }
    }
}

/// What is remembered of a cart besides its content.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    cart: Cart,
    last: Option<(Operation, Option<LoggedOrder>)>,
    #[serde(skip)]
    ordering: bool,
}

/// All that a shop knows, for another instance of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShopState {
    carts: BTreeMap<String, Entry>,
    /// The orders, oldest first.
    pub orders: Vec<LoggedOrder>,
}

impl Entry {
    /// The answer of before when this is the last operation again, `None` when it is the next one.
    fn replay(&self, given: u64, operation: Operation) -> Result<Option<Answer>, Refusal> {
        let last = self.cart.sequence;
        if given == last + 1 {
            return Ok(None);
        }
        if given != last || last == 0 {
            return Err(Refusal::Sequence { last, given });
        }
        match &self.last {
            Some((before, order)) if *before == operation => {
                Ok(Some(Answer { cart: self.cart.clone(), replayed: true, order: order.clone() }))
            }
            _ => Err(Refusal::Different { given }),
        }
    }
}

/// What the shop says to an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// It is done, or was before: this is the answer.
    Done(Answer),
    /// Write this order to disk, then call [`Shop::ordered`] or [`Shop::order_failed`].
    Write(Order),
}

/// All carts and orders.
#[derive(Debug, Default)]
pub struct Shop {
    carts: HashMap<String, Entry>,
    orders: Vec<LoggedOrder>,
}

impl Shop {
    /// A shop whose earlier orders are known from its log. Carts are held in memory only and start empty.
    pub fn new(orders: Vec<LoggedOrder>) -> Self {
        Self { carts: HashMap::new(), orders }
    }

    /// A shop that goes on where another one is, whose orders are in the log already.
    pub fn from_state(state: ShopState) -> Self {
        Self { carts: state.carts.into_iter().collect(), orders: state.orders }
    }

    /// All that it knows. No order is being written meanwhile.
    pub fn state(&self) -> ShopState {
        let carts = self.carts.iter().map(|(name, entry)| (name.clone(), entry.clone())).collect();
        ShopState { carts, orders: self.orders.clone() }
    }

    /// Whether nothing has been done in it yet.
    pub fn is_new(&self) -> bool {
        self.carts.is_empty() && self.orders.is_empty()
    }

    /// Carries out operation number `given` on a cart.
    pub fn operate(&mut self, cart: &str, given: u64, operation: Operation) -> Result<Step, Refusal> {
        if !self.carts.contains_key(cart) && self.carts.len() >= MAX_CARTS {
            return Err(Refusal::Invalid { reason: format!("there are {MAX_CARTS} carts already") });
        }
        let unknown = Entry::default();
        let entry = self.carts.get(cart).unwrap_or(&unknown);
        if entry.ordering {
            return Err(Refusal::Busy);
        }
        if let Some(answer) = entry.replay(given, operation)? {
            return Ok(Step::Done(answer));
        }
        entry.cart.check(operation)?;
        let entry = self.carts.entry(cart.to_owned()).or_default();
        if operation == Operation::Order {
            entry.ordering = true;
            return Ok(Step::Write(Order {
                cart: cart.to_owned(),
                cart_sequence: given,
                items: entry.cart.items.clone(),
            }));
        }
        entry.cart.apply(operation);
        entry.last = Some((operation, None));
        Ok(Step::Done(Answer { cart: entry.cart.clone(), replayed: false, order: None }))
    }

    /// The order is on disk.
    pub fn ordered(&mut self, logged: LoggedOrder) -> Answer {
        let entry = self.carts.entry(logged.order.cart.clone()).or_default();
        entry.cart.apply(Operation::Order);
        entry.last = Some((Operation::Order, Some(logged.clone())));
        entry.ordering = false;
        let answer = Answer { cart: entry.cart.clone(), replayed: false, order: Some(logged.clone()) };
        self.orders.push(logged);
        answer
    }

    /// The order could not be written: the cart stays as it was.
    pub fn order_failed(&mut self, cart: &str) {
        if let Some(entry) = self.carts.get_mut(cart) {
            entry.ordering = false;
        }
    }

    /// A cart; an unknown one is empty.
    pub fn cart(&self, cart: &str) -> Cart {
        self.carts.get(cart).map(|entry| entry.cart.clone()).unwrap_or_default()
    }

    /// How many orders there are.
    pub fn order_count(&self) -> u64 {
        self.orders.len() as u64
    }

    /// Orders as held in memory, of one cart or of all.
    pub fn orders(&self, cart: Option<&str>) -> Vec<LoggedOrder> {
        let wanted = |logged: &&LoggedOrder| cart.is_none_or(|cart| logged.order.cart == cart);
        self.orders.iter().filter(wanted).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ADD: Operation = Operation::Add { product: 3, count: 2 };

    fn answer(step: Step) -> Answer {
        match step {
            Step::Done(answer) => answer,
            Step::Write(order) => panic!("unexpected order {order:?}"),
        }
    }

    #[test]
    fn an_operation_sent_twice_is_carried_out_once() {
        let mut shop = Shop::default();
        let first = answer(shop.operate("a", 1, ADD).unwrap());
        let second = answer(shop.operate("a", 1, ADD).unwrap());
        assert!(!first.replayed && second.replayed);
        assert_eq!(first.cart, second.cart);
        assert_eq!(shop.cart("a").items, [(3, 2)].into());
    }

    #[test]
    fn a_skipped_a_stale_and_a_changed_operation_are_refused() {
        let mut shop = Shop::default();
        assert_eq!(shop.operate("a", 0, ADD), Err(Refusal::Sequence { last: 0, given: 0 }));
        assert_eq!(shop.operate("a", 2, ADD), Err(Refusal::Sequence { last: 0, given: 2 }));
        shop.operate("a", 1, ADD).unwrap();
        shop.operate("a", 2, ADD).unwrap();
        assert_eq!(shop.operate("a", 1, ADD), Err(Refusal::Sequence { last: 2, given: 1 }));
        let other = Operation::Remove { product: 3, count: 1 };
        assert_eq!(shop.operate("a", 2, other), Err(Refusal::Different { given: 2 }));
        assert_eq!(shop.cart("a").items, [(3, 4)].into());
    }

    #[test]
    fn a_refused_operation_makes_no_cart() {
        let mut shop = Shop::default();
        assert!(shop.operate("a", 1, Operation::Add { product: 0, count: 1 }).is_err());
        assert!(shop.operate("a", 1, Operation::Add { product: 1, count: 0 }).is_err());
        assert!(shop.operate("a", 1, Operation::Order).is_err());
        assert!(shop.carts.is_empty());
    }

    #[test]
    fn an_order_empties_the_cart_once_it_is_written_and_not_before() {
        let mut shop = Shop::default();
        shop.operate("a", 1, ADD).unwrap();
        let Step::Write(order) = shop.operate("a", 2, Operation::Order).unwrap() else { panic!("no order") };
        assert_eq!(order.items, [(3, 2)].into());
        assert_eq!(shop.operate("a", 2, Operation::Order), Err(Refusal::Busy));
        shop.order_failed("a");
        assert_eq!(shop.cart("a"), Cart { sequence: 1, items: [(3, 2)].into() });

        let Step::Write(order) = shop.operate("a", 2, Operation::Order).unwrap() else { panic!("no order") };
        let logged = LoggedOrder { sequence: 1, checksum: 9, order };
        assert_eq!(shop.ordered(logged.clone()).order, Some(logged.clone()));
        assert_eq!(shop.cart("a"), Cart { sequence: 2, items: Items::new() });
        let again = answer(shop.operate("a", 2, Operation::Order).unwrap());
        assert!(again.replayed);
        assert_eq!(again.order, Some(logged.clone()));
        assert_eq!(shop.orders(Some("a")), [logged]);
        assert!(shop.orders(Some("b")).is_empty());
    }

    fn operations() -> impl Strategy<Value = Vec<(bool, u32, u32)>> {
        prop::collection::vec((any::<bool>(), 1..4_u32, 1..5_u32), 1..60)
    }

    proptest! {
        /// Repeating any operation any number of times, as a client does that has lost an answer, changes nothing.
        #[test]
        fn repeats_do_not_change_the_outcome(operations in operations(), repeats in prop::collection::vec(0..3_u8, 60)) {
            let (mut once, mut often) = (Shop::default(), Shop::default());
            for (index, (add, product, count)) in operations.into_iter().enumerate() {
                let sequence = index as u64 + 1;
                let operation =
                    if add { Operation::Add { product, count } } else { Operation::Remove { product, count } };
                once.operate("a", sequence, operation).unwrap();
                for _ in 0..=repeats[index] {
                    often.operate("a", sequence, operation).unwrap();
                }
            }
            prop_assert_eq!(once.cart("a"), often.cart("a"));
        }
    }
}
