//! Timers and signals.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{SigEvent, SigSet, SigevNotify, Signal, kill};
use nix::sys::time::{TimeSpec, TimeValLike};
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::sys::timerfd::{ClockId as FdClock, Expiration as FdExpiration, TimerFd, TimerFlags};
use nix::unistd::getpid;
use signal_hook::iterator::Signals;

use crate::{Kind, Outcome};

/// How often timers go off.
const INTERVAL: TimeSpec = TimeSpec::new(0, 20_000_000);
/// Timers may be late, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(5);
/// What the alarm clock is set to: it must not ring while anybody looks.
const ALARM_S: u32 = 36_000;

pub(crate) fn make() -> Outcome<Vec<Kind>> {
    let (handled, timer_rang) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let mut signals = Signals::new([signal_hook::consts::SIGUSR1, signal_hook::consts::SIGIO])?;
    let (of_handler, of_timer) = (Arc::clone(&handled), Arc::clone(&timer_rang));
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        for signal in signals.forever() {
            let counter = if signal == signal_hook::consts::SIGIO { &of_timer } else { &of_handler };
            counter.fetch_add(1, Ordering::Release);
        }
    })?;
    let handler = Kind::new("signal-handler", move || {
        let before = handled.load(Ordering::Acquire);
        kill(getpid(), Signal::SIGUSR1)?;
        grows(&handled, before)
    });
    Ok(vec![handler, timerfd()?, periodic_timerfd()?, posix_timer(timer_rang)?, alarm()])
}

fn grows(counter: &AtomicU64, before: u64) -> Outcome {
    let since = Instant::now();
    while counter.load(Ordering::Acquire) <= before {
        if since.elapsed() > PATIENCE {
            return Err(format!("the signal does not come: {before} did").into());
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Leaves SIGUSR2 blocked in all threads and one pending. [`crate::identity`] sees in `/proc` whether it stays so.
pub(crate) fn block_pending_signal() -> Outcome {
    let mut blocked = SigSet::empty();
    blocked.add(Signal::SIGUSR2);
    blocked.thread_block()?;
    Ok(kill(getpid(), Signal::SIGUSR2)?)
}

/// One that goes off once and is set again by each look: running or with its tick unread when it is moved.
fn timerfd() -> Outcome<Kind> {
    let timer = TimerFd::new(FdClock::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC)?;
    let set = move |timer: &TimerFd| timer.set(FdExpiration::OneShot(INTERVAL), TimerSetTimeFlags::empty());
    set(&timer)?;
    Ok(Kind::new("timerfd", move || {
        let mut set_of_one = [PollFd::new(timer.as_fd(), PollFlags::POLLIN)];
        let since = Instant::now();
        while !matches!(poll(&mut set_of_one, 100_u8), Ok(1)) {
            if since.elapsed() > PATIENCE {
                return Err("it does not go off".into());
            }
        }
        timer.wait()?;
        Ok(set(&timer)?)
    }))
}

/// One that goes off every hour. CRIU 4.2.1 does not start a periodic one again whose tick was unread when it was dumped
/// (checkpoint-restore/criu#3162), so one with a short period cannot be asked for.
fn periodic_timerfd() -> Outcome<Kind> {
    let timer = TimerFd::new(FdClock::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC)?;
    timer.set(FdExpiration::Interval(TimeSpec::hours(1)), TimerSetTimeFlags::empty())?;
    let mut last = TimeSpec::hours(1);
    Ok(Kind::new("periodic-timerfd", move || match timer.get()? {
        Some(FdExpiration::IntervalDelayed(left, period)) if period == TimeSpec::hours(1) && left < last => {
            last = left;
            Ok(())
        }
        other => Err(format!("it is set to {other:?}, and {last:?} were left").into()),
    }))
}

fn posix_timer(rang: Arc<AtomicU64>) -> Outcome<Kind> {
    let (asking, questions) = mpsc::channel::<()>();
    let (answering, answers) = mpsc::channel();
    // A timer cannot be given to another thread.
    thread::Builder::new().name("timer".to_owned()).spawn(move || {
        let mut timer = set_posix_timer();
        while questions.recv().is_ok() && answering.send(as_set(&mut timer)).is_ok() {}
    })?;
    Ok(Kind::new("posix-timer", move || {
        asking.send(())?;
        answers.recv_timeout(PATIENCE)??;
        grows(&rang, rang.load(Ordering::Acquire))
    }))
}

fn set_posix_timer() -> nix::Result<Timer> {
    let notify = SigevNotify::SigevSignal { signal: Signal::SIGIO, si_value: 0 };
    let mut timer = Timer::new(nix::time::ClockId::CLOCK_MONOTONIC, SigEvent::new(notify))?;
    timer.set(Expiration::Interval(INTERVAL), TimerSetTimeFlags::empty()).map(|()| timer)
}

fn as_set(timer: &mut nix::Result<Timer>) -> Outcome {
    let found = timer.as_mut().map_err(|error| *error)?.get()?;
    match found {
        Some(Expiration::IntervalDelayed(_, INTERVAL) | Expiration::Interval(INTERVAL)) => Ok(()),
        other => Err(format!("it is set to {other:?}").into()),
    }
}

/// The one that has not rung yet: setting it anew tells what was left.
fn alarm() -> Kind {
    nix::unistd::alarm::set(ALARM_S);
    Kind::new("alarm-clock", || {
        let Some(left) = nix::unistd::alarm::set(ALARM_S) else { return Err("it was not set any more".into()) };
        let lost = TimeSpec::seconds(i64::from(ALARM_S) - i64::from(left)).num_seconds();
        if (0..60).contains(&lost) { Ok(()) } else { Err(format!("{left} s were left of {ALARM_S}").into()) }
    })
}
