//! The CPU limit of real containers, in whatever version of cgroups this machine has.

#![allow(clippy::unwrap_used, reason = "a helper that fails has to fail its test")]

mod lab;

use std::fs;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use lab::Lab;
use podferry_runtime::{CgroupPaths, CpuLimit, CpuQuota, Error};
use serde_json::json;

/// Takes all the CPU time that it gets.
const BUSY: &str = "while true; do :; done";

/// The files that have the limit, as they are.
fn files(quota: &CpuQuota) -> Vec<String> {
    let names = ["cpu.max", "cpu.max.burst", "cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.cfs_burst_us"];
    names.iter().filter_map(|name| fs::read_to_string(quota.dir().join(name)).ok()).collect()
}

/// CPUs that are used in the next second.
fn used(quota: &CpuQuota) -> f64 {
    let (before, begun) = (quota.used().unwrap(), Instant::now());
    sleep(Duration::from_secs(1));
    quota.used().unwrap().saturating_sub(before).as_secs_f64() / begun.elapsed().as_secs_f64()
}

#[test]
fn a_busy_container_is_held_to_its_throttle_and_has_its_own_limit_again() {
    let own_limits = [
        (json!({"quota": 60_000, "period": 100_000}), Some(60_000), 100_000),
        (json!({"quota": 20_000, "period": 25_000}), Some(20_000), 25_000),
        (json!({}), None, 100_000),
    ];
    for (cpu, quota_us, period_us) in own_limits {
        let lab = Lab::with_config(BUSY, |config| config["linux"]["resources"]["cpu"] = cpu);
        let container = lab.run();
        let quota = CpuQuota::of(&container).unwrap();
        let own = quota.limit().unwrap();
        assert_eq!(own, CpuLimit { quota_us, period_us, burst_us: 0 });
        let before = files(&quota);
        assert!(used(&quota) > 0.1, "it is not busy");

        for rate in [100_000, 50_000] {
            assert_eq!(quota.throttle(&own, rate).unwrap(), rate);
            assert_ne!(files(&quota), before);
            let cpus = used(&quota);
            // Each processor may have taken a slice of the time in advance.
            assert!(cpus < 0.15, "{rate}: it has {cpus}");
        }
        assert_eq!(quota.throttle(&own, 1).unwrap(), own.least_rate(), "the kernel takes the least that is said to be");

        quota.restore(&own).unwrap();
        assert_eq!((files(&quota), quota.limit().unwrap()), (before, own));
        assert!(used(&quota) > 0.1, "it is not busy again");
    }
}

/// Not every runc knows bursts, so the file is written here.
#[test]
fn a_burst_does_not_keep_a_container_from_being_throttled_and_comes_back() {
    let lab = Lab::with_config(BUSY, |config| {
        config["linux"]["resources"]["cpu"] = json!({"quota": 60_000, "period": 100_000});
    });
    let quota = CpuQuota::of(&lab.run()).unwrap();
    let burst = ["cpu.max.burst", "cpu.cfs_burst_us"].map(|name| quota.dir().join(name));
    let Some(burst) = burst.iter().find(|file| file.exists()) else { panic!("this kernel has no bursts (5.14)") };
    fs::write(burst, "50000").unwrap();
    let (own, before) = (quota.limit().unwrap(), files(&quota));
    assert_eq!(own.burst_us, 50_000);
    quota.throttle(&own, 20_000).unwrap();
    quota.restore(&own).unwrap();
    assert_eq!(files(&quota), before);
}

#[test]
fn a_container_that_is_gone_has_nothing_to_restore() {
    let lab = Lab::new(BUSY);
    let quota = CpuQuota::of(&lab.run()).unwrap();
    let own = quota.limit().unwrap();
    quota.throttle(&own, 50_000).unwrap();
    lab.runc.delete(&lab.id, true).unwrap();
    quota.restore(&own).unwrap();
    assert!(quota.throttle(&own, 50_000).is_err());
}

/// A cgroup of version 2 that has no cpu controller, removed when the test ends.
struct Bare(PathBuf);

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn a_cgroup_of_version_2_without_the_controller_says_where_to_switch_it_on() {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let unified = mounts.lines().find(|line| line.contains(" - cgroup2 ")).expect("mount a cgroup2 hierarchy");
    let point = PathBuf::from(unified.split(' ').nth(4).unwrap());
    // Two levels: nothing is switched on for children of a new cgroup.
    let above = Bare(point.join(format!("podferry-test-quota-{}", std::process::id())));
    let bare = Bare(above.0.join("bare"));
    fs::create_dir_all(&bare.0).unwrap();
    let error = CpuQuota::at(&CgroupPaths::V2(bare.0.clone())).unwrap_err();
    assert!(matches!(error, Error::NoCpuController { .. }), "{error}");
    assert!(error.to_string().contains(&bare.0.display().to_string()), "{error}");
    drop(bare);
}
