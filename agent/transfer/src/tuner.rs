//! Whether and how hard to pack, decided by what the link and this processor are seen to do.
//!
//! With packing at a level, raw bytes go at the lesser of what the level packs in a second and of what the link carries
//! times the ratio. Without, they go as the link does. The link's rate is what the receiver acknowledges while writers
//! have to wait; speed and ratio of the levels are measured on samples of the very bytes that are sent.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::compression::{Level, Packing};

/// On faster links, in bytes per second, nothing pays: one core packs memory at about this rate (`docs/performance.md`).
const FAST_LINK: f64 = 400.0 * 1024.0 * 1024.0;
/// Packing is chosen when it promises this much more: the processor that packs is also the one that encrypts,
const PROMISED: f64 = 1.3;
/// and kept while it gives this much more.
const KEPT: f64 = 1.05;
/// A level is left for another that promises this much more than it does: the measurements are not that good.
const BETTER: f64 = 1.1;
/// How long the link is watched before anything is concluded.
const WINDOW: Duration = Duration::from_millis(50);
/// Writers that wait less than this part of the time are themselves what is slow.
const WAITING: f64 = 0.25;
/// How often levels are measured anew.
const SAMPLE_EVERY: Duration = Duration::from_millis(250);
/// For how long packing is not tried again after it did not keep its promise; each time twice as long,
const PAUSE: Duration = Duration::from_secs(5);
/// up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// The share of a new measurement in the running average.
const FRESH: f64 = 0.3;

/// Decides for one transfer. Its users share it.
pub(crate) struct Tuner {
    /// The level's place in [`Level::ALL`], or [`OFF`].
    level: AtomicU8,
    state: Mutex<State>,
}

const OFF: u8 = u8::MAX;

impl Tuner {
    pub(crate) fn new(now: Instant) -> Self {
        Self { level: AtomicU8::new(OFF), state: Mutex::new(State::new(now)) }
    }

    /// The level to pack with now.
    pub(crate) fn level(&self) -> Option<Level> {
        Level::ALL.get(usize::from(self.level.load(Ordering::Relaxed))).copied()
    }

    /// Whether levels should be measured now; whoever is told so does it.
    pub(crate) fn wants_samples(&self, now: Instant) -> bool {
        self.with(|state| state.wants_samples(now))
    }

    /// A level packed something.
    pub(crate) fn packed(&self, level: Level, packing: Packing) {
        self.with(|state| state.packed(level, packing));
    }

    /// The receiver acknowledged `wire` bytes so far; writers waited for `waited` so far.
    pub(crate) fn acknowledged(&self, wire: u64, waited: Duration, now: Instant) {
        self.with(|state| state.acknowledged(wire, waited, now));
    }

    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        // Averages are whole whatever their last user did.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut state);
        let place = state.level.and_then(|level| Level::ALL.iter().position(|other| *other == level));
        let place = place.and_then(|place| u8::try_from(place).ok()).unwrap_or(OFF);
        self.level.store(place, Ordering::Relaxed);
        result
    }
}

/// What a level was seen to do.
#[derive(Debug, Clone, Copy)]
struct Seen {
    /// Raw bytes per second.
    speed: f64,
    /// Raw bytes per packed byte.
    ratio: f64,
}

struct State {
    level: Option<Level>,
    seen: [Option<Seen>; Level::ALL.len()],
    /// Bytes per second, once writers had to wait for it.
    link: Option<f64>,
    /// What the link carried when nothing was packed: what packing must beat.
    plain: f64,
    window: Instant,
    window_wire: u64,
    window_waited: Duration,
    sampled: Option<Instant>,
    paused_until: Instant,
    pause: Duration,
    /// The first window after a change carries bytes of both.
    changed: bool,
}

impl State {
    fn new(now: Instant) -> Self {
        Self {
            level: None,
            seen: [None; Level::ALL.len()],
            link: None,
            plain: 0.0,
            window: now,
            window_wire: 0,
            window_waited: Duration::ZERO,
            sampled: None,
            paused_until: now,
            pause: PAUSE,
            changed: false,
        }
    }

    fn wants_samples(&mut self, now: Instant) -> bool {
        let slow = self.link.is_some_and(|link| link < FAST_LINK) && now >= self.paused_until;
        let due = self.sampled.is_none_or(|sampled| now.duration_since(sampled) >= SAMPLE_EVERY);
        if slow && due {
            self.sampled = Some(now);
        }
        slow && due
    }

    fn packed(&mut self, level: Level, packing: Packing) {
        let seconds = packing.took.as_secs_f64().max(1e-9);
        let new =
            Seen { speed: as_f64(packing.raw) / seconds, ratio: as_f64(packing.raw) / as_f64(packing.packed.max(1)) };
        let seen = &mut self.seen[level as usize];
        *seen = Some(match *seen {
            None => new,
            Some(old) => Seen { speed: blend(old.speed, new.speed), ratio: blend(old.ratio, new.ratio) },
        });
    }

    fn acknowledged(&mut self, wire: u64, waited: Duration, now: Instant) {
        let length = now.duration_since(self.window);
        if length < WINDOW {
            return;
        }
        let rate = as_f64(wire.saturating_sub(self.window_wire)) / length.as_secs_f64();
        let waiting = waited.saturating_sub(self.window_waited).as_secs_f64() / length.as_secs_f64();
        (self.window, self.window_wire, self.window_waited) = (now, wire, waited);
        if std::mem::take(&mut self.changed) {
            return;
        }
        self.learn(rate, waiting, now);
        let before = self.level;
        self.level = self.choose(now);
        self.changed = before != self.level;
    }

    fn learn(&mut self, rate: f64, waiting: f64, now: Instant) {
        if waiting >= WAITING {
            self.link = Some(self.link.map_or(rate, |link| f64::midpoint(link, rate)));
        } else if self.link.is_some_and(|link| rate > link) {
            self.link = Some(rate);
        }
        let Some(level) = self.level else {
            if waiting >= WAITING {
                self.plain = rate;
            }
            return;
        };
        let raw = rate * self.seen[level as usize].map_or(1.0, |seen| seen.ratio);
        if raw < self.plain * KEPT {
            // Somebody else is slow (the store, this processor), or the link changed: begin again from what is known.
            self.paused_until = now + self.pause;
            self.pause = (2 * self.pause).min(LONGEST_PAUSE);
            self.link = Some(self.plain);
        }
    }

    fn choose(&self, now: Instant) -> Option<Level> {
        let link = self.link.filter(|link| *link < FAST_LINK && now >= self.paused_until)?;
        let promise = |level: &Level| self.seen[*level as usize].map_or(0.0, |seen| seen.speed.min(link * seen.ratio));
        let best = Level::ALL.into_iter().max_by(|one, other| promise(one).total_cmp(&promise(other)))?;
        if promise(&best) < self.demand(link) {
            return None;
        }
        let stay = self.level.filter(|level| promise(level) * BETTER > promise(&best));
        Some(stay.unwrap_or(best))
    }

    /// What packing must promise: more to begin with than to go on.
    fn demand(&self, link: f64) -> f64 {
        link * if self.level.is_some() { KEPT } else { PROMISED }
    }
}

fn blend(old: f64, new: f64) -> f64 {
    old + FRESH * (new - old)
}

#[expect(clippy::cast_precision_loss, reason = "byte counts for rates; 2^53 bytes are 8 PiB")]
fn as_f64(bytes: impl TryInto<u64>) -> f64 {
    bytes.try_into().unwrap_or(u64::MAX) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: f64 = 1024.0 * 1024.0;

    /// A machine whose levels and link do what they are said to do.
    struct World {
        /// Raw MiB/s and ratio of each level.
        levels: [(f64, f64); 4],
        /// MiB/s.
        link: f64,
        /// Raw MiB/s that the receiver's store takes.
        store: f64,
    }

    impl World {
        /// Runs for that many windows; answers with raw MiB/s of the second half, and the last level.
        fn run(&self, windows: u32) -> (f64, Option<Level>) {
            let mut now = Instant::now();
            let mut state = State::new(now);
            let (mut wire, mut waited, mut raw) = (0.0, Duration::ZERO, 0.0);
            for window in 0..windows {
                if state.wants_samples(now) {
                    for level in Level::ALL {
                        state.packed(level, self.packing(level));
                    }
                }
                let (speed, ratio) = state.level.map_or((1e6, 1.0), |level| self.levels[level as usize]);
                let rate = speed.min(self.link * ratio).min(self.store);
                let seconds = WINDOW.as_secs_f64();
                wire += rate / ratio * seconds * MIB;
                raw += if window >= windows / 2 { rate * seconds } else { 0.0 };
                waited += if rate < speed { WINDOW } else { Duration::ZERO };
                now += WINDOW;
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small and positive")]
                state.acknowledged(wire as u64, waited, now);
            }
            (raw / (f64::from(windows - windows / 2) * WINDOW.as_secs_f64()), state.level)
        }

        fn packing(&self, level: Level) -> Packing {
            let (speed, ratio) = self.levels[level as usize];
            let raw = 1_usize << 16;
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small and positive")]
            let packed = (as_f64(raw) / ratio) as usize;
            Packing { raw, packed, took: Duration::from_secs_f64(as_f64(raw) / (speed * MIB)) }
        }
    }

    /// Memory of a JVM as measured on one core.
    const JVM: [(f64, f64); 4] = [(686.0, 2.56), (543.0, 3.31), (450.0, 3.76), (317.0, 3.77)];
    const NOISE: [(f64, f64); 4] = [(8000.0, 1.0); 4];

    #[test]
    fn a_slow_link_packs_hard_and_gains_the_ratio() {
        let (rate, level) = World { levels: JVM, link: 24.0, store: 1e6 }.run(100);
        assert!(matches!(level, Some(Level::Middle | Level::Small)), "{level:?}");
        assert!(rate > 24.0 * 3.5, "{rate}");
    }

    #[test]
    fn a_gigabit_link_packs_as_fast_as_the_processor_can() {
        let (rate, level) = World { levels: JVM, link: 119.0, store: 1e6 }.run(100);
        assert_eq!(level, Some(Level::Middle));
        assert!(rate > 119.0 * 3.5, "{rate}");
    }

    #[test]
    fn a_fast_link_is_left_alone() {
        assert_eq!(World { levels: JVM, link: 1500.0, store: 1e6 }.run(100), (1500.0, None));
    }

    #[test]
    fn it_is_never_slower_than_without() {
        let slow = [(100.0, 4.0), (80.0, 5.0), (60.0, 6.0), (40.0, 7.0)];
        for levels in [JVM, NOISE, slow] {
            for link in [10.0, 24.0, 119.0, 300.0, 500.0, 600.0, 1500.0] {
                for store in [50.0, 200.0, 1e6] {
                    let (rate, level) = World { levels, link, store }.run(400);
                    let plain = link.min(store);
                    assert!(rate > plain * 0.97, "{rate} of {plain} MiB/s at {level:?}");
                }
            }
        }
    }
}
