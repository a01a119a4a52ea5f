//! The bandwidth of a node, shared by what leaves it.
//!
//! Whoever has sent bytes owes them, and goes on when they are paid. Payments come at the node's rate, to all debtors in equal parts at
//! every moment, whatever the sizes of what they send; one that is held up elsewhere leaves its part to the others. Debtors that are in
//! a hurry, because a container stands still for them, are paid first.

use std::collections::HashMap;
use std::future::Future as _;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

/// Payments of so long a time are kept when nobody owes anything: below the resolution of timers a limit would cost throughput.
const KEPT: Duration = Duration::from_millis(5);
/// Less than this of a byte is nothing: sums of parts are not exact.
const NOTHING: f64 = 1e-3;

/// A rate that is shared. Clones share it, too.
#[derive(Clone, Debug)]
pub struct Shares(Arc<Mutex<Account>>);

impl PartialEq for Shares {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Shares {}

#[derive(Debug)]
struct Account {
    /// Bytes per second.
    rate: f64,
    paid_until: Instant,
    /// Payments that nobody has taken.
    kept: f64,
    debts: HashMap<u64, Debt>,
    next: u64,
}

#[derive(Debug)]
struct Debt {
    bytes: f64,
    urgent: Arc<AtomicBool>,
    waker: Option<Waker>,
}

impl Debt {
    fn is_urgent(&self) -> bool {
        self.urgent.load(Ordering::Relaxed)
    }
}

impl Shares {
    /// So many bytes per second, at least 1.
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    pub fn new(bytes_per_second: u64) -> Self {
        let (paid_until, debts) = (Instant::now(), HashMap::new());
        let rate = bytes_per_second.max(1) as f64;
        Self(Arc::new(Mutex::new(Account { rate, paid_until, kept: 0.0, debts, next: 0 })))
    }

    fn lock(&self) -> MutexGuard<'_, Account> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A share of it.
    pub fn share(&self) -> Share {
        self.share_for(Arc::default())
    }

    /// A share that is always in a hurry.
    pub fn urgent_share(&self) -> Share {
        self.share_for(Arc::new(AtomicBool::new(true)))
    }

    /// A share that is in a hurry as long as that says so.
    pub(crate) fn share_for(&self, urgent: Arc<AtomicBool>) -> Share {
        let mut account = self.lock();
        account.next += 1;
        let id = account.next;
        drop(account);
        Share { shares: self.clone(), id, urgent, timer: None }
    }
}

impl Shares {
    /// Who waits looks anew at when it will be paid: somebody is in a hurry now.
    pub(crate) fn settle_anew(&self) {
        self.lock().wake_all();
    }
}

impl Account {
    fn wake_all(&mut self) {
        for debt in self.debts.values_mut() {
            debt.wake();
        }
    }

    /// Pays for the time up to `now`.
    fn pay(&mut self, now: Instant) {
        let time = now.saturating_duration_since(self.paid_until).as_secs_f64();
        let mut payment = time.mul_add(self.rate, self.kept);
        self.paid_until = self.paid_until.max(now);
        while payment > NOTHING {
            let urgent = self.debts.values().any(Debt::is_urgent);
            let mut group: Vec<_> = self.debts.values_mut().filter(|debt| debt.is_urgent() || !urgent).collect();
            let Some(least) = group.iter().map(|debt| debt.bytes).reduce(f64::min) else { break };
            #[expect(clippy::cast_precision_loss, reason = "a few debtors")]
            let count = group.len() as f64;
            let part = least.min(payment / count);
            for debt in &mut group {
                debt.bytes -= part;
            }
            payment -= part * count;
            self.debts.retain(|_, debt| debt.bytes > NOTHING || debt.wake());
        }
        self.kept = payment.max(0.0).min(KEPT.as_secs_f64() * self.rate);
    }

    /// When that debt will be paid, if nobody else comes or goes.
    fn due(&self, id: u64) -> Option<Instant> {
        let own = self.debts.get(&id)?;
        let before = |debt: &Debt| match (debt.is_urgent(), own.is_urgent()) {
            (true, false) => debt.bytes,
            (false, true) => 0.0,
            _ => debt.bytes.min(own.bytes),
        };
        let bytes: f64 = self.debts.values().map(before).sum();
        let wait = Duration::try_from_secs_f64((bytes - self.kept).max(0.0) / self.rate);
        Some(self.paid_until + wait.unwrap_or(Duration::from_secs(1)))
    }
}

impl Debt {
    /// Wakes the debtor; always `false`, since the debt is over.
    fn wake(&mut self) -> bool {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
        false
    }
}

/// One debtor's part of a shared rate.
#[derive(Debug)]
pub struct Share {
    shares: Shares,
    id: u64,
    urgent: Arc<AtomicBool>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Share {
    /// So many bytes were sent.
    #[expect(clippy::cast_precision_loss, reason = "a few megabytes")]
    pub(crate) fn owe(&mut self, bytes: usize) {
        let mut account = self.shares.lock();
        account.pay(Instant::now());
        let urgent = Arc::clone(&self.urgent);
        let debt = account.debts.entry(self.id).or_insert_with(|| Debt { bytes: 0.0, urgent, waker: None });
        debt.bytes += bytes as f64;
    }

    /// Whether all is paid.
    pub(crate) fn poll_paid(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let mut account = self.shares.lock();
            account.pay(Instant::now());
            let Some(due) = account.due(self.id) else {
                self.timer = None;
                return Poll::Ready(());
            };
            if let Some(debt) = account.debts.get_mut(&self.id) {
                debt.waker = Some(cx.waker().clone());
            }
            drop(account);
            let mut timer = Box::pin(sleep_until(due));
            // A due that is over already is looked at again at once.
            if timer.as_mut().poll(cx).is_pending() {
                self.timer = Some(timer);
                return Poll::Pending;
            }
        }
    }

    /// Sends so many bytes: returns when they are paid.
    pub async fn spend(&mut self, bytes: usize) {
        self.owe(bytes);
        std::future::poll_fn(|cx| self.poll_paid(cx)).await;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut account = self.shares.lock();
        account.debts.remove(&self.id);
        // The others have more now.
        account.wake_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use proptest::prelude::*;

    use super::*;

    /// How much each of these has got, in a while of being always in debt, with frames of these sizes.
    fn contest(frames: &[(u32, bool)]) -> Vec<f64> {
        let shares = Shares::new(1_000_000);
        let begun = Instant::now();
        let mut account = shares.lock();
        account.paid_until = begun;
        let mut sent = vec![0.0; frames.len()];
        for step in 0..5_000_u64 {
            account.pay(begun + Duration::from_millis(step));
            for ((id, (size, urgent)), sent) in (0..).zip(frames).zip(&mut sent) {
                account.debts.entry(id).or_insert_with(|| {
                    *sent += f64::from(*size);
                    Debt { bytes: f64::from(*size), urgent: Arc::new(AtomicBool::new(*urgent)), waker: None }
                });
            }
        }
        sent
    }

    #[test]
    fn two_get_the_same_whatever_the_size_of_their_frames() {
        let got = contest(&[(64 << 10, false), (16 << 10, false)]);
        assert!((0.9..1.15).contains(&(got[0] / got[1])), "{got:?}");
    }

    #[test]
    fn who_is_in_a_hurry_is_paid_first() {
        let got = contest(&[(64 << 10, false), (64 << 10, true), (64 << 10, false)]);
        assert!(got[1] > 20.0 * got[0] && got[1] > 20.0 * got[2], "{got:?}");
    }

    /// When each of these debts is paid, in seconds.
    fn dues(debts: &[(f64, bool)]) -> Vec<f64> {
        let shares = Shares::new(1_000_000);
        let mut account = shares.lock();
        for (id, (bytes, urgent)) in (0..).zip(debts) {
            let urgent = Arc::new(AtomicBool::new(*urgent));
            account.debts.insert(id, Debt { bytes: *bytes, urgent, waker: None });
        }
        let ids = 0..u64::try_from(debts.len()).unwrap();
        ids.map(|id| account.due(id).unwrap().duration_since(account.paid_until).as_secs_f64()).collect()
    }

    #[test]
    fn one_alone_has_all_of_it_and_who_owes_less_is_done_earlier() {
        let close = |got: Vec<f64>, wanted: &[f64]| {
            assert!(
                got.iter().zip(wanted).all(|(got, wanted)| (got - wanted).abs() < 1e-3),
                "{got:?} and not {wanted:?}"
            );
        };
        close(dues(&[(1e6, false)]), &[1.0]);
        close(dues(&[(1e6, false), (5e5, false)]), &[1.5, 1.0]);
        close(dues(&[(1e6, false), (1e6, true)]), &[2.0, 1.0]);
    }

    #[test]
    fn who_goes_away_leaves_its_part() {
        let shares = Shares::new(1_000_000);
        let (mut stays, mut goes) = (shares.share(), shares.share());
        stays.owe(1_000_000);
        goes.owe(100_000_000);
        let due = || {
            let account = shares.lock();
            account.due(stays.id).unwrap().duration_since(account.paid_until).as_secs_f64()
        };
        let beside = due();
        drop(goes);
        let alone = due();
        assert!((1.8..2.01).contains(&(beside / alone)), "{beside} s, then {alone} s");
    }

    /// Counts how often it is woken.
    #[derive(Default)]
    struct Woken(AtomicU32);

    impl std::task::Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[tokio::test]
    async fn who_comes_into_a_hurry_while_it_waits_is_paid_earlier() {
        let shares = Shares::new(1_000_000);
        let urgent = Arc::new(AtomicBool::new(false));
        let (mut hurries, mut other) = (shares.share_for(Arc::clone(&urgent)), shares.share());
        other.owe(100_000_000);
        hurries.owe(10_000_000);
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(Arc::clone(&woken));
        let mut due = || {
            assert!(hurries.poll_paid(&mut Context::from_waker(&waker)).is_pending());
            hurries.timer.as_ref().unwrap().deadline()
        };
        let before = due();
        urgent.store(true, Ordering::Relaxed);
        shares.settle_anew();
        assert_eq!(woken.0.load(Ordering::Relaxed), 1, "or it sleeps on until {before:?}");
        assert!(before.duration_since(due()) > Duration::from_secs(5));
    }

    proptest! {
        #[test]
        fn nothing_is_paid_twice_and_nothing_is_kept_back(
            debts in prop::collection::vec((1_u32..100_000, any::<bool>()), 1..6), steps in prop::collection::vec(1_u32..50, 1..40),
        ) {
            let shares = Shares::new(1_000_000);
            let owed: f64 = debts.iter().map(|(bytes, _)| f64::from(*bytes)).sum();
            let mut account = shares.lock();
            let mut now = account.paid_until;
            for (id, (bytes, urgent)) in (0..).zip(&debts) {
                let urgent = Arc::new(AtomicBool::new(*urgent));
                account.debts.insert(id, Debt { bytes: f64::from(*bytes), urgent, waker: None });
            }
            let mut passed = 0.0;
            for step in steps {
                now += Duration::from_millis(step.into());
                account.pay(now);
                passed += f64::from(step) * 1e3;
                let left: f64 = account.debts.values().map(|debt| debt.bytes).sum();
                prop_assert!((left - (owed - passed).max(0.0)).abs() < 1.0, "{left} of {owed} are left after {passed}");
            }
        }
    }
}
