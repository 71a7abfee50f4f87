//! Whether a target is up: a state machine of events and time, without sockets and without a clock
//! of its own.
//!
//! Four judges, and a target is up when none of them says otherwise: the configured check (`fall`,
//! `rise`), the connections of clients (a failed one puts the target out for a while that doubles
//! each time), the tailnet, and the resolver. The operator's drain is no judgement, and is not kept
//! here.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};

use crate::moment;

/// How long a target is ejected the first time; doubles with each further one.
const EJECTION_FIRST: Duration = Duration::from_secs(1);
/// The longest that a target is ejected. One that has been up for longer than this since it came
/// back begins with [`EJECTION_FIRST`] again.
const EJECTION_MAX: Duration = Duration::from_secs(30);
/// Changes that are remembered for the operator.
const HISTORY: usize = 16;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The configured check passed; `rise` in a row bring a target back.
    CheckPassed {
        /// As configured.
        rise: u32,
    },
    /// The configured check failed; `fall` in a row take a target down.
    CheckFailed {
        /// As configured.
        fall: u32,
        /// For people.
        reason: String,
        /// It answered, if not as it should.
        answers: bool,
    },
    /// The configuration has no check any more.
    NoCheck,
    /// What the check of another upstream says of the machine: why nothing answers there, or that
    /// something does.
    CheckedElsewhere {
        /// The other upstream.
        by: Arc<str>,
        /// For people.
        silent: Option<String>,
    },
    /// A connection of a client could not be made.
    DialFailed {
        /// When its dial began: those that were under way together failed of one cause.
        started: Instant,
        /// For people.
        reason: String,
    },
    /// A connection of a client was made.
    DialPassed,
    /// A connection of a client was reset before the target had sent a byte.
    ResetEarly {
        /// When it was made.
        started: Instant,
    },
    /// The attempt to reach a target that was ejected for long enough succeeded.
    ProbePassed,
    /// That attempt failed.
    ProbeFailed {
        /// For people.
        reason: String,
        /// It answered, if not as it should.
        answers: bool,
    },
    /// What the tailnet says of the target; `None`: nothing.
    Tailnet {
        /// Whether the control server reaches it.
        online: Option<bool>,
    },
    /// The name has addresses.
    Resolved,
    /// The name has no address, and never had one.
    Unresolved {
        /// For people.
        reason: String,
    },
}

/// What an event changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Outcome {
    /// It is up now (true), down now (false), or what it was before.
    pub up: Option<bool>,
    /// Nothing answers there any more: established connections are dead.
    pub lost: bool,
}

/// A change, as the operator sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// Unix time, seconds.
    pub at: f64,
    /// What it became.
    pub up: bool,
    /// Why.
    pub reason: String,
}

/// The state of one target.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Health {
    check: Check,
    /// By upstream: why its check is not answered by the same machine.
    elsewhere: BTreeMap<Arc<str>, String>,
    ejection: Option<Ejection>,
    /// Times that it was ejected without a long time in between.
    times_ejected: u32,
    #[serde(with = "moment::maybe")]
    back_since: Option<Instant>,
    #[serde(with = "moment::maybe")]
    last_failure: Option<Instant>,
    offline: bool,
    unresolved: Option<String>,
    history: VecDeque<Change>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Check {
    passes: u32,
    failures: u32,
    down: Option<String>,
    /// The last failure was that nothing answered.
    silent: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Ejection {
    #[serde(with = "moment::instant")]
    until: Instant,
    reason: String,
    /// It answered, if only with a reset.
    answers: bool,
    /// A second sign says the same: a probe, or the check. One failed dial may be a full accept
    /// queue, or an ingress that starts again.
    confirmed: bool,
    passes: u32,
}

impl Event {
    /// What it tells of the machine, whatever upstream it was met in. What is answered depends on
    /// the PROXY header and the check, which are the upstream's.
    pub fn of_the_machine(&self) -> Option<Self> {
        match self {
            Self::DialFailed { .. } => Some(self.clone()),
            Self::DialPassed | Self::ProbePassed => Some(Self::DialPassed),
            _ => None,
        }
    }
}

impl Health {
    /// Takes note of an event that happened at `now`.
    pub fn apply(&mut self, event: Event, now: Instant) -> Outcome {
        let before = (self.reason().is_none(), self.is_lost());
        match event {
            Event::CheckPassed { rise } => {
                self.check.failures = 0;
                self.check.passes = self.check.passes.saturating_add(1);
                if self.check.passes >= rise {
                    self.check.down = None;
                }
                if let Some(ejection) = &mut self.ejection {
                    ejection.passes += 1;
                    if ejection.passes >= rise && !ejection.answers {
                        self.come_back(now);
                    }
                }
            }
            Event::CheckFailed { fall, reason, answers } => {
                self.check.passes = 0;
                self.check.silent = !answers;
                self.check.failures = self.check.failures.saturating_add(1);
                if self.check.failures >= fall || self.check.down.is_some() {
                    self.check.down = Some(reason);
                }
                if !answers {
                    self.confirm();
                }
            }
            Event::NoCheck => self.check = Check::default(),
            Event::CheckedElsewhere { by, silent: Some(reason) } => {
                self.elsewhere.insert(by, reason);
            }
            Event::CheckedElsewhere { by, silent: None } => {
                self.elsewhere.remove(&by);
            }
            Event::DialFailed { started, reason } => self.eject(started, reason, false, now),
            Event::ResetEarly { started } => {
                self.eject(started, "reset: it resets connections before it sends a byte".to_owned(), true, now);
            }
            Event::DialPassed => {
                if self.ejection.as_ref().is_some_and(|ejection| !ejection.answers) {
                    self.come_back(now);
                }
            }
            Event::ProbePassed => self.come_back(now),
            Event::ProbeFailed { reason, answers } => {
                if self.ejection.is_some() {
                    self.set_ejection(reason, answers, now);
                    self.confirm();
                }
            }
            Event::Tailnet { online } => self.offline = online == Some(false),
            Event::Resolved => self.unresolved = None,
            Event::Unresolved { reason } => self.unresolved = Some(reason),
        }
        let (was_up, was_lost) = before;
        let up = self.reason().is_none();
        Outcome { up: (up != was_up).then_some(up), lost: self.is_lost() && !was_lost }
    }

    /// It is down because it resets connections, and for no other reason.
    pub fn only_resets(&self) -> bool {
        let others =
            self.offline || self.unresolved.is_some() || self.check.down.is_some() || !self.elsewhere.is_empty();
        !others && self.ejection.as_ref().is_some_and(|ejection| ejection.answers)
    }

    /// Why it is down; `None`: it is up.
    pub fn reason(&self) -> Option<&str> {
        if self.offline {
            return Some("offline: the tailnet says so");
        }
        let ejection = self.ejection.as_ref().map(|ejection| &ejection.reason);
        let elsewhere = self.elsewhere.values().next();
        self.unresolved.as_ref().or(self.check.down.as_ref()).or(elsewhere).or(ejection).map(String::as_str)
    }

    /// When it is time to try whether a target that was ejected answers again.
    pub fn probe_due(&self) -> Option<Instant> {
        self.ejection.as_ref().map(|ejection| ejection.until)
    }

    /// Forgets what the checks of upstreams said that have none any more.
    pub fn retain_elsewhere(&mut self, mut checks: impl FnMut(&str) -> bool) {
        self.elsewhere.retain(|upstream, _| checks(upstream));
    }

    /// Keeps a change for the operator.
    pub fn remember(&mut self, up: bool, at: SystemTime) {
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        let reason = self.reason().unwrap_or("ok").to_owned();
        self.history.push_back(Change { at: crate::logging::unix_seconds(at), up, reason });
    }

    /// The last changes, oldest first.
    pub fn history(&self) -> Vec<Change> {
        self.history.iter().cloned().collect()
    }

    fn is_lost(&self) -> bool {
        self.offline
            || self.check.down.is_some()
            || self.ejection.as_ref().is_some_and(|ejection| ejection.confirmed)
            || self.is_lost_by_elsewhere()
    }

    /// Another upstream's check is no proof: it may be silent because of its own server name or
    /// PROXY header. Beside something else that was not answered, it is the second sign.
    fn is_lost_by_elsewhere(&self) -> bool {
        let check_failed = self.check.failures > 0 && self.check.silent;
        !self.elsewhere.is_empty() && (check_failed || self.unreachable().is_some())
    }

    /// Why nothing answers there, by the word of the check; what answers is told apart by the
    /// PROXY header and the server name, which are the upstream's.
    pub fn silent(&self) -> Option<&str> {
        self.check.down.as_deref().filter(|_| self.check.silent)
    }

    /// Why nothing answers there, by the word of connections.
    pub fn unreachable(&self) -> Option<&str> {
        self.ejection.as_ref().filter(|ejection| !ejection.answers).map(|ejection| &*ejection.reason)
    }

    fn confirm(&mut self) {
        if let Some(ejection) = &mut self.ejection {
            ejection.confirmed = !ejection.answers;
        }
    }

    fn eject(&mut self, started: Instant, reason: String, answers: bool, now: Instant) {
        // What began before the last failure is no further one, and what began before it was back
        // is of before.
        if [self.last_failure, self.back_since].into_iter().flatten().any(|at| started <= at) {
            return;
        }
        self.last_failure = Some(now);
        if let Some(ejection) = &mut self.ejection {
            // It was tried because all others were down, too. That is no reason to keep it away
            // longer.
            (ejection.reason, ejection.answers) = (reason, answers);
            ejection.confirmed &= !answers;
            return;
        }
        if self.back_since.is_some_and(|at| now.duration_since(at) > EJECTION_MAX) {
            self.times_ejected = 0;
        }
        self.set_ejection(reason, answers, now);
    }

    fn set_ejection(&mut self, reason: String, answers: bool, now: Instant) {
        let time = (EJECTION_FIRST * 2u32.saturating_pow(self.times_ejected.min(10))).min(EJECTION_MAX);
        self.times_ejected += 1;
        self.ejection = Some(Ejection { until: now + time, reason, answers, confirmed: false, passes: 0 });
    }

    fn come_back(&mut self, now: Instant) {
        if self.ejection.take().is_some() {
            self.back_since = Some(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const NOTHING: Outcome = Outcome { up: None, lost: false };
    const UP: Outcome = Outcome { up: Some(true), lost: false };
    const DOWN: Outcome = Outcome { up: Some(false), lost: false };
    const LOST: Outcome = Outcome { up: Some(false), lost: true };

    fn check(passed: bool) -> Event {
        if passed {
            Event::CheckPassed { rise: 2 }
        } else {
            Event::CheckFailed { fall: 3, reason: "check".into(), answers: false }
        }
    }

    #[test]
    fn what_no_check_elsewhere_is_answered_by_is_down_until_one_is() {
        let (mut health, now) = (Health::default(), Instant::now());
        let by = |name: &str, silent: Option<&str>| Event::CheckedElsewhere {
            by: name.into(),
            silent: silent.map(str::to_owned),
        };
        assert_eq!(health.apply(by("a", Some("check: timeout")), now), DOWN);
        assert_eq!(health.reason(), Some("check: timeout"));
        assert_eq!(health.apply(Event::DialPassed, now), NOTHING, "a paused machine still accepts");
        assert_eq!(health.apply(by("b", Some("check: timeout")), now), NOTHING);
        assert_eq!(health.apply(by("a", None), now), NOTHING);
        assert_eq!(health.apply(by("b", None), now), UP);
        for answers in [false, true] {
            let failed = || Event::CheckFailed { fall: 1, reason: "check".into(), answers };
            health.apply(failed(), now);
            assert_eq!(health.silent().is_some(), !answers, "what answers is told to nobody else");
        }
    }

    #[test]
    fn a_check_elsewhere_loses_established_connections_only_beside_a_second_sign() {
        let now = Instant::now();
        let silent = |name: &str| Event::CheckedElsewhere { by: name.into(), silent: Some("check: timeout".into()) };
        let lost = Outcome { up: None, lost: true };
        for sign in [refused(now), check(false), Event::Tailnet { online: Some(false) }] {
            let mut health = Health::default();
            assert_eq!(health.apply(silent("a"), now), DOWN);
            assert_eq!(health.apply(silent("a"), now), NOTHING, "the same again is no other sign");
            assert_eq!(health.apply(silent("b"), now), NOTHING, "nor is another check elsewhere");
            assert_eq!(health.apply(sign.clone(), now), lost, "{sign:?}");
        }
        let mut health = Health::default();
        assert_eq!(health.apply(refused(now), now), DOWN);
        assert_eq!(health.apply(silent("a"), now), lost, "it may come second, too");
        assert_eq!(health.apply(Event::ProbeFailed { reason: "refused".into(), answers: false }, now), NOTHING, "once");
        let answers = [
            Event::ResetEarly { started: now },
            Event::CheckFailed { fall: 3, reason: "check".into(), answers: true },
            Event::Unresolved { reason: "resolve: no such name".into() },
        ];
        for sign in answers {
            let mut health = Health::default();
            assert_eq!(health.apply(silent("a"), now), DOWN);
            assert_eq!(health.apply(sign.clone(), now), NOTHING, "{sign:?} does not say that nothing answers");
        }
    }

    fn refused(started: Instant) -> Event {
        Event::DialFailed { started, reason: "refused".into() }
    }

    #[test]
    fn fall_failures_in_a_row_take_it_down_and_rise_passes_in_a_row_bring_it_back() {
        let (mut health, now) = (Health::default(), Instant::now());
        for passed in [false, false, true, false, false] {
            assert_eq!(health.apply(check(passed), now), NOTHING);
        }
        assert_eq!(health.apply(check(false), now), LOST);
        assert_eq!(health.reason(), Some("check"));
        for passed in [false, true, false, true] {
            assert_eq!(health.apply(check(passed), now), NOTHING);
        }
        assert_eq!(health.apply(check(true), now), UP);
        assert_eq!(health.reason(), None);
    }

    #[test]
    fn one_failed_dial_ejects_it_for_a_time_that_doubles_up_to_a_limit() {
        let (mut health, mut now) = (Health::default(), Instant::now());
        assert_eq!(health.apply(refused(now), now), DOWN);
        for seconds in [1, 2, 4, 8, 16, 30, 30] {
            assert_eq!(health.probe_due(), Some(now + SECOND * seconds));
            now += SECOND * seconds;
            let first = seconds == 1;
            let outcome = health.apply(Event::ProbeFailed { reason: "refused".into(), answers: false }, now);
            assert_eq!(outcome, Outcome { up: None, lost: first }, "the second sign counts, once");
        }
        assert_eq!(health.apply(Event::ProbePassed, now), UP);
        assert_eq!(health.probe_due(), None);
    }

    #[test]
    fn one_refused_dial_says_nothing_of_established_connections_until_a_second_sign_does() {
        let signs = [
            Event::ProbeFailed { reason: "refused".into(), answers: false },
            check(false),
            Event::Tailnet { online: Some(false) },
        ];
        for sign in signs {
            let (mut health, now) = (Health::default(), Instant::now());
            assert_eq!(health.apply(refused(now), now), DOWN);
            assert_eq!(health.apply(refused(now + SECOND), now + SECOND), NOTHING, "the same again is no other sign");
            assert_eq!(health.apply(sign.clone(), now + SECOND), Outcome { up: None, lost: true }, "{sign:?}");
        }
        let (mut health, now) = (Health::default(), Instant::now());
        health.apply(refused(now), now);
        let wrong = Event::CheckFailed { fall: 3, reason: "check".into(), answers: true };
        assert_eq!(health.apply(wrong, now), NOTHING, "a wrong answer is an answer");
    }

    #[test]
    fn a_target_that_fails_again_soon_is_ejected_for_longer_but_not_after_a_long_good_time() {
        let (mut health, mut now) = (Health::default(), Instant::now());
        health.apply(refused(now), now);
        health.apply(Event::ProbePassed, now + SECOND);
        now += 2 * SECOND;
        health.apply(refused(now), now);
        assert_eq!(health.probe_due(), Some(now + 2 * SECOND));
        health.apply(Event::ProbePassed, now + 2 * SECOND);
        now += 60 * SECOND;
        health.apply(refused(now), now);
        assert_eq!(health.probe_due(), Some(now + SECOND));
    }

    #[test]
    fn dials_that_were_under_way_together_count_once() {
        let (mut health, now) = (Health::default(), Instant::now());
        health.apply(refused(now), now + SECOND);
        health.apply(Event::ProbePassed, now + 2 * SECOND);
        assert_eq!(health.apply(refused(now + SECOND / 2), now + 3 * SECOND), NOTHING);
        assert_eq!(health.apply(refused(now + 3 * SECOND), now + 3 * SECOND), DOWN);
    }

    #[test]
    fn connections_from_before_its_outage_say_nothing_of_a_target_that_is_back() {
        let (mut health, now) = (Health::default(), Instant::now());
        health.apply(refused(now), now);
        // Made while it was tried because all others were down, too.
        let started = now + SECOND / 2;
        health.apply(Event::ProbePassed, now + SECOND);
        assert_eq!(health.apply(Event::ResetEarly { started }, now + 2 * SECOND), NOTHING);
        assert_eq!(health.apply(refused(started), now + 2 * SECOND), NOTHING);
    }

    #[test]
    fn a_target_that_resets_connections_early_is_down_but_not_lost() {
        let (mut health, now) = (Health::default(), Instant::now());
        let outcome = health.apply(Event::ResetEarly { started: now }, now);
        assert_eq!(outcome, Outcome { up: Some(false), lost: false });
        assert_eq!(health.apply(Event::DialPassed, now), NOTHING, "that it accepts connections was known");
        assert_eq!(health.apply(check(true), now), NOTHING);
        assert_eq!(health.apply(check(true), now), NOTHING);
        assert!(health.only_resets());
        health.apply(Event::Tailnet { online: Some(false) }, now);
        assert!(!health.only_resets(), "others speak against it, too");
        health.apply(Event::Tailnet { online: Some(true) }, now);
        assert_eq!(health.apply(Event::ProbePassed, now + SECOND), UP);
    }

    #[test]
    fn a_target_that_reset_connections_and_then_answers_no_more_is_lost() {
        let (mut health, now) = (Health::default(), Instant::now());
        health.apply(Event::ResetEarly { started: now }, now);
        let probe = |answers: bool| Event::ProbeFailed { reason: "probe".into(), answers };
        assert_eq!(health.apply(probe(true), now + SECOND), NOTHING);
        assert_eq!(health.apply(probe(false), now + 3 * SECOND), Outcome { up: None, lost: true });
    }

    #[test]
    fn a_connection_of_a_client_or_the_check_brings_back_what_a_dial_ejected() {
        let (mut health, now) = (Health::default(), Instant::now());
        health.apply(refused(now), now);
        assert_eq!(health.apply(Event::DialPassed, now), UP);
        health.apply(refused(now + SECOND), now + SECOND);
        assert_eq!(health.apply(check(true), now), NOTHING);
        assert_eq!(health.apply(check(true), now), UP);
    }

    #[test]
    fn a_connection_of_a_client_does_not_overrule_the_check() {
        let (mut health, now) = (Health::default(), Instant::now());
        for _ in 0..3 {
            health.apply(check(false), now);
        }
        assert_eq!(health.apply(Event::DialPassed, now), NOTHING);
        assert_eq!(health.apply(Event::NoCheck, now), UP, "the check was taken out of the configuration");
    }

    #[test]
    fn the_tailnet_says_offline_before_anything_fails_and_silence_says_nothing() {
        let (mut health, now) = (Health::default(), Instant::now());
        assert_eq!(health.apply(Event::Tailnet { online: Some(true) }, now), NOTHING);
        assert_eq!(health.apply(Event::Tailnet { online: Some(false) }, now), LOST);
        assert_eq!(health.apply(Event::DialPassed, now), NOTHING);
        assert_eq!(health.apply(Event::Tailnet { online: None }, now), UP, "tailscaled is gone");
    }

    #[test]
    fn a_name_without_an_address_is_down_until_it_has_one() {
        let (mut health, now) = (Health::default(), Instant::now());
        let outcome = health.apply(Event::Unresolved { reason: "resolve: no such name".into() }, now);
        assert_eq!(outcome, Outcome { up: Some(false), lost: false });
        assert_eq!(health.apply(Event::Resolved, now), UP);
    }

    #[test]
    fn the_history_keeps_the_last_changes() {
        let mut health = Health::default();
        for n in 0..40 {
            health.remember(n % 2 == 0, SystemTime::UNIX_EPOCH + SECOND * n);
        }
        let history = health.history();
        assert_eq!((history.len(), history[15].at), (HISTORY, 39.0));
    }
}
