//! Threads that compute, and one that waits.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::{Kind, Outcome};

const THREADS: usize = 4;

/// What a thread has come to: how many steps, and their sum in whole and in floating-point numbers.
#[derive(Default)]
struct Tally {
    steps: AtomicU64,
    wrong: AtomicU64,
}

pub(crate) fn make() -> Outcome<Vec<Kind>> {
    Ok(vec![computing()?, waiting()?])
}

fn computing() -> Outcome<Kind> {
    let tallies: Arc<[Tally; THREADS]> = Arc::default();
    for index in 0..THREADS {
        let tallies = Arc::clone(&tallies);
        thread::Builder::new().name(format!("counter-{index}")).spawn(move || compute(&tallies[index]))?;
    }
    let mut last = [0; THREADS];
    Ok(Kind::new("threads", move || {
        // A step takes a millisecond; a thread that was lost does not come to its next one.
        for _ in 0..2000 {
            let now = std::array::from_fn(|index| tallies[index].steps.load(Ordering::Acquire));
            if tallies.iter().any(|tally| tally.wrong.load(Ordering::Acquire) != 0) {
                return Err("a thread's registers or stack are not what they were".into());
            }
            if now.iter().zip(last).all(|(now, last)| *now > last) {
                last = now;
                return Ok(());
            }
            thread::sleep(Duration::from_millis(1));
        }
        Err("a thread stands still".into())
    }))
}

/// Sums up in whole numbers (on the stack) and in floating-point ones (in vector registers); both have closed forms.
fn compute(tally: &Tally) {
    let (mut step, mut whole, mut half) = (0_u64, 0_u64, 0.0_f64);
    loop {
        step += 1;
        whole = whole.wrapping_add(step);
        half += 0.5;
        let expected = u64::try_from(u128::from(step) * u128::from(step + 1) / 2 % (1 << 64)).unwrap_or_default();
        // Up to 2^32 steps, so exact: 136 years at a step a millisecond.
        let exact = f64::from(u32::try_from(step).unwrap_or(u32::MAX)) / 2.0;
        if whole != expected || (half - exact).abs() > f64::EPSILON {
            tally.wrong.fetch_add(1, Ordering::Release);
        }
        tally.steps.store(step, Ordering::Release);
        thread::sleep(Duration::from_millis(1));
    }
}

/// A thread in a futex wait, which every look wakes up.
fn waiting() -> Outcome<Kind> {
    let door = Arc::new((Mutex::new(0_u64), Condvar::new()));
    let (sender, receiver) = mpsc::channel();
    let inside = Arc::clone(&door);
    thread::Builder::new().name("waiter".to_owned()).spawn(move || {
        let mut seen = 0;
        loop {
            let guard = inside.0.lock().unwrap_or_else(PoisonError::into_inner);
            let guard = inside.1.wait_while(guard, |knocks| *knocks == seen);
            seen = *guard.unwrap_or_else(PoisonError::into_inner);
            if sender.send(seen).is_err() {
                return;
            }
        }
    })?;
    let mut knocks = 0;
    Ok(Kind::new("futex", move || {
        knocks += 1;
        *door.0.lock().unwrap_or_else(PoisonError::into_inner) = knocks;
        door.1.notify_one();
        crate::same("the waiter's answer", &receiver.recv_timeout(Duration::from_secs(5))?, &knocks)
    }))
}
