//! How much CPU time a container may have, through its cgroup, in either version.
//!
//! | | limit | burst | time that it had |
//! |---|---|---|---|
//! | v2 | `cpu.max`: `QUOTA PERIOD`, or `max PERIOD` for none | `cpu.max.burst` | `cpu.stat`: `usage_usec` |
//! | v1 | `cpu.cfs_quota_us`, -1 for none; `cpu.cfs_period_us` | `cpu.cfs_burst_us` | `cpuacct.usage`, in nanoseconds |
//!
//! All tasks of the cgroup together run for at most `QUOTA` microseconds in each `PERIOD`, and then not before the next. A period is
//! never changed here: what was there before is then a single number, and what the container is used to wait for stays.
//!
//! A rate is CPU time per second of real time in microseconds: 1 000 000 for one CPU, more for several.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::cgroup::CgroupPaths;
use crate::container::Container;
use crate::error::Error;

/// The kernel takes no smaller quota (`min_cfs_quota_period` in `kernel/sched/core.c`), in microseconds.
const LEAST_QUOTA: u64 = 1000;
/// The rate of one whole CPU.
const ONE_CPU: u64 = 1_000_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Version {
    V1,
    V2,
}

/// How much CPU time a cgroup may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuLimit {
    /// Microseconds in each period; none for as many as there are.
    pub quota_us: Option<u64>,
    /// A period, in microseconds.
    pub period_us: u64,
    /// What may be saved up for later periods, in microseconds; 0 also where the kernel knows no bursts (before 5.14).
    pub burst_us: u64,
}

impl CpuLimit {
    /// The limit as a rate; none without one.
    pub fn rate(&self) -> Option<u64> {
        self.quota_us.map(|quota| quota.saturating_mul(ONE_CPU) / self.period_us.max(1))
    }

    /// The lowest rate that the kernel takes with this period: a hundredth of a CPU with the usual 100 ms.
    pub fn least_rate(&self) -> u64 {
        LEAST_QUOTA * ONE_CPU / self.period_us.max(1)
    }
}

/// Reads and changes a cgroup's CPU limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuQuota {
    version: Version,
    dir: PathBuf,
    /// The file that tells the time that the cgroup had.
    usage: PathBuf,
}

impl CpuQuota {
    /// The limit of a container.
    ///
    /// # Errors
    /// When its cgroup has no cpu controller.
    pub fn of(container: &Container) -> Result<Self, Error> {
        Self::at(&container.cgroups)
    }

    /// The limit of a cgroup.
    ///
    /// # Errors
    /// When the cgroup has no cpu controller.
    pub fn at(cgroups: &CgroupPaths) -> Result<Self, Error> {
        let unified = match cgroups {
            CgroupPaths::V2(dir) => Some(dir.as_path()),
            CgroupPaths::V1(_) => match cgroups.controller("cpu") {
                Some(dir) => return Self::v1(dir, cgroups.controller("cpuacct").unwrap_or(dir)),
                None => cgroups.controller(""),
            },
        };
        let Some(dir) = unified else {
            return Err(Error::NoCpuController { place: "the container's v1 hierarchies".to_owned() });
        };
        // A controller that is not switched on for a cgroup has no files there.
        if !dir.join("cpu.max").exists() {
            return Err(Error::NoCpuController { place: dir.display().to_string() });
        }
        Ok(Self { version: Version::V2, dir: dir.to_owned(), usage: dir.join("cpu.stat") })
    }

    fn v1(dir: &Path, accounting: &Path) -> Result<Self, Error> {
        // A kernel without CONFIG_CFS_BANDWIDTH has shares only.
        if !dir.join("cpu.cfs_quota_us").exists() {
            return Err(Error::NoCpuController { place: dir.display().to_string() });
        }
        Ok(Self { version: Version::V1, dir: dir.to_owned(), usage: accounting.join("cpuacct.usage") })
    }

    /// The cgroup's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The limit now.
    ///
    /// # Errors
    /// When a file cannot be read or understood.
    pub fn limit(&self) -> Result<CpuLimit, Error> {
        let (quota_us, period_us) = match self.version {
            Version::V1 => {
                let quota = self.read("cpu.cfs_quota_us", |text| match text {
                    "-1" => Some(None),
                    number => number.parse().ok().map(Some),
                })?;
                (quota, self.read("cpu.cfs_period_us", |text| text.parse().ok())?)
            }
            Version::V2 => self.read("cpu.max", |text| {
                let (quota, period) = text.split_once(' ')?;
                let quota = if quota == "max" { None } else { Some(quota.parse().ok()?) };
                Some((quota, period.parse().ok()?))
            })?,
        };
        let burst_us = match self.read(self.burst_file(), |text| text.parse().ok()) {
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => 0,
            read => read?,
        };
        Ok(CpuLimit { quota_us, period_us, burst_us })
    }

    /// Holds the cgroup to a rate: never to more than `own`, its own limit, and never to less than the kernel takes. Gives the rate
    /// that it is held to.
    ///
    /// # Errors
    /// When a file cannot be written. The limit may have no burst then.
    pub fn throttle(&self, own: &CpuLimit, rate: u64) -> Result<u64, Error> {
        let quota = (rate.saturating_mul(own.period_us) / ONE_CPU).max(LEAST_QUOTA);
        let quota = own.quota_us.map_or(quota, |most| quota.min(most));
        // The kernel refuses a quota below the burst, and saved time is no limit.
        if own.burst_us > 0 {
            self.write(self.burst_file(), "0")?;
        }
        let limit = CpuLimit { quota_us: Some(quota), burst_us: 0, ..*own };
        self.write_quota(&limit)?;
        Ok(limit.rate().unwrap_or(rate))
    }

    /// Gives the cgroup the limit back that was read from it. Idempotent; a cgroup that is gone needs none.
    ///
    /// # Errors
    /// When a file cannot be read or written; to be called again.
    pub fn restore(&self, own: &CpuLimit) -> Result<(), Error> {
        match self.try_restore(own) {
            Err(_) if !self.dir.exists() => Ok(()),
            restored => restored,
        }
    }

    fn try_restore(&self, own: &CpuLimit) -> Result<(), Error> {
        let now = self.limit()?;
        if now == *own {
            return Ok(());
        }
        if (now.quota_us, now.period_us) != (own.quota_us, own.period_us) {
            self.write_quota(own)?;
        }
        if now.burst_us != own.burst_us {
            self.write(self.burst_file(), &own.burst_us.to_string())?;
        }
        Ok(())
    }

    /// CPU time that the cgroup's tasks have had so far.
    ///
    /// # Errors
    /// When the file cannot be read or understood.
    pub fn used(&self) -> Result<Duration, Error> {
        let text = fs::read_to_string(&self.usage).map_err(Error::io("read", &self.usage))?;
        let used = match self.version {
            Version::V1 => text.trim().parse().ok().map(Duration::from_nanos),
            Version::V2 => {
                let line = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
                line.and_then(|number| number.trim().parse().ok()).map(Duration::from_micros)
            }
        };
        used.ok_or_else(|| Error::CpuFile { path: self.usage.clone(), text: text.trim().chars().take(80).collect() })
    }

    fn burst_file(&self) -> &'static str {
        match self.version {
            Version::V1 => "cpu.cfs_burst_us",
            Version::V2 => "cpu.max.burst",
        }
    }

    fn write_quota(&self, limit: &CpuLimit) -> Result<(), Error> {
        let quota = limit.quota_us.map(|quota| quota.to_string());
        match self.version {
            Version::V1 => self.write("cpu.cfs_quota_us", quota.as_deref().unwrap_or("-1")),
            Version::V2 => {
                let quota = quota.as_deref().unwrap_or("max");
                self.write("cpu.max", &format!("{quota} {}", limit.period_us))
            }
        }
    }

    fn read<T>(&self, file: &str, understand: impl FnOnce(&str) -> Option<T>) -> Result<T, Error> {
        let path = self.dir.join(file);
        let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        understand(text.trim()).ok_or_else(|| Error::CpuFile { path, text: text.trim().chars().take(80).collect() })
    }

    fn write(&self, file: &str, text: &str) -> Result<(), Error> {
        let path = self.dir.join(file);
        fs::write(&path, text).map_err(Error::io("write", path))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// A folder with files as a cgroup of version 2 has them.
    fn unified(max: &str, burst: Option<&str>) -> (tempfile::TempDir, CpuQuota) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cpu.max"), max).unwrap();
        fs::write(dir.path().join("cpu.stat"), "usage_usec 1500000\nuser_usec 1000000\nsystem_usec 500000\n").unwrap();
        if let Some(burst) = burst {
            fs::write(dir.path().join("cpu.max.burst"), burst).unwrap();
        }
        let quota = CpuQuota::at(&CgroupPaths::V2(dir.path().to_owned())).unwrap();
        (dir, quota)
    }

    fn said(dir: &tempfile::TempDir, file: &str) -> String {
        fs::read_to_string(dir.path().join(file)).unwrap()
    }

    #[test]
    fn version_2_is_read_lowered_and_restored_to_the_letter() {
        for (max, burst) in [("max 100000", "0"), ("150000 100000", "20000"), ("max 50000", "0")] {
            let (dir, quota) = unified(&format!("{max}\n"), Some(burst));
            let own = quota.limit().unwrap();
            assert_eq!(quota.throttle(&own, 400_000).unwrap(), 400_000);
            assert_eq!(said(&dir, "cpu.max"), format!("{} {}", own.period_us * 4 / 10, own.period_us));
            assert_eq!(said(&dir, "cpu.max.burst"), "0");
            assert_ne!(quota.limit().unwrap(), own);
            quota.restore(&own).unwrap();
            assert_eq!((said(&dir, "cpu.max"), said(&dir, "cpu.max.burst")), (max.to_owned(), burst.to_owned()));
            assert_eq!(quota.limit().unwrap(), own);
        }
    }

    #[test]
    fn a_kernel_without_bursts_is_understood() {
        let (dir, quota) = unified("max 100000\n", None);
        let own = quota.limit().unwrap();
        assert_eq!(own, CpuLimit { quota_us: None, period_us: 100_000, burst_us: 0 });
        quota.throttle(&own, 10_000).unwrap();
        quota.restore(&own).unwrap();
        assert!(!dir.path().join("cpu.max.burst").exists());
    }

    #[test]
    fn a_limit_is_never_raised_and_never_below_what_the_kernel_takes() {
        let (dir, quota) = unified("50000 100000\n", Some("0"));
        let own = quota.limit().unwrap();
        assert_eq!((own.rate(), own.least_rate()), (Some(500_000), 10_000));
        assert_eq!(quota.throttle(&own, 2_000_000).unwrap(), 500_000);
        assert_eq!(said(&dir, "cpu.max"), "50000 100000");
        assert_eq!(quota.throttle(&own, 1).unwrap(), 10_000);
        assert_eq!(said(&dir, "cpu.max"), "1000 100000");
    }

    #[test]
    fn the_time_that_was_had_is_told() {
        let (dir, quota) = unified("max 100000\n", None);
        assert_eq!(quota.used().unwrap(), Duration::from_millis(1500));
        fs::write(dir.path().join("cpu.stat"), "nr_periods 0\n").unwrap();
        assert!(quota.used().unwrap_err().to_string().contains("cpu.stat"));
    }

    #[test]
    fn version_1_has_two_files_and_minus_one() {
        let dir = tempfile::tempdir().unwrap();
        let files = [("cpu.cfs_quota_us", "-1\n"), ("cpu.cfs_period_us", "100000\n"), ("cpuacct.usage", "7000\n")];
        for (file, text) in files {
            fs::write(dir.path().join(file), text).unwrap();
        }
        let controllers = ["cpu", "cpuacct"].map(|name| (name.to_owned(), dir.path().to_owned()));
        let quota = CpuQuota::at(&CgroupPaths::V1(BTreeMap::from(controllers))).unwrap();
        let own = quota.limit().unwrap();
        assert_eq!((own.quota_us, quota.used().unwrap()), (None, Duration::from_micros(7)));
        quota.throttle(&own, 800_000).unwrap();
        assert_eq!(said(&dir, "cpu.cfs_quota_us"), "80000");
        quota.restore(&own).unwrap();
        assert_eq!((said(&dir, "cpu.cfs_quota_us"), said(&dir, "cpu.cfs_period_us")), ("-1".into(), "100000\n".into()));
    }

    #[test]
    fn a_cgroup_without_the_controller_says_what_helps() {
        let dir = tempfile::tempdir().unwrap();
        let error = CpuQuota::at(&CgroupPaths::V2(dir.path().to_owned())).unwrap_err().to_string();
        assert!(error.contains(&dir.path().display().to_string()) && error.contains("subtree_control"), "{error}");
        let freezer = BTreeMap::from([("freezer".to_owned(), dir.path().to_owned())]);
        assert!(CpuQuota::at(&CgroupPaths::V1(freezer)).is_err());
        // A hybrid: the cpu controller may be in the unified hierarchy beside the others.
        let hybrid = BTreeMap::from([
            ("freezer".to_owned(), PathBuf::from("/sys/fs/cgroup/freezer/x")),
            (String::new(), dir.path().to_owned()),
        ]);
        fs::write(dir.path().join("cpu.max"), "max 100000\n").unwrap();
        assert!(CpuQuota::at(&CgroupPaths::V1(hybrid)).is_ok());
    }

    #[test]
    fn what_is_no_limit_is_an_error_that_names_the_file() {
        for text in ["", "max", "many 100000", "-5 100000", "1000 x"] {
            let (_dir, quota) = unified(text, None);
            let error = quota.limit().unwrap_err().to_string();
            assert!(error.contains("cpu.max"), "{text:?}: {error}");
        }
    }

    #[test]
    fn a_cgroup_that_is_gone_has_nothing_to_restore() {
        let (dir, quota) = unified("max 100000\n", None);
        let own = quota.limit().unwrap();
        drop(dir);
        assert!(quota.limit().is_err() && quota.throttle(&own, 1000).is_err());
        quota.restore(&own).unwrap();
    }

    #[test]
    fn what_it_was_survives_being_written_down() {
        let (_dir, quota) = unified("150000 100000\n", Some("2000"));
        let noted = (quota.clone(), quota.limit().unwrap());
        let text = serde_json::to_string(&noted).unwrap();
        assert_eq!(serde_json::from_str::<(CpuQuota, CpuLimit)>(&text).unwrap(), noted);
    }
}
