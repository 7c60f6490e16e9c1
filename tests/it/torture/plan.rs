//! What happens in a round, drawn from its seed. The same seed and the same fault give the same plan, whatever other
//! rounds there are; what the machine makes of it is a matter of timing.

use std::fmt;
use std::time::Duration;

use super::media;
use crate::relay::message;
use crate::writer::Dice;

/// What a round is about: a row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fault {
    None,
    KillSource,
    KillDestination,
    KillBoth,
    KillAgain,
    KillCommand,
    Cancel,
    PowerSource,
    PowerDestination,
    PowerBoth,
    PowerAgain,
    Cut,
    Cuts,
    HalfOpen,
    Slow,
    Reorder,
    Late,
    Unplug,
    FullDisk,
    FullRecordSource,
    FullRecordDestination,
    DeadRecordSource,
    DeadRecordDestination,
    ReadErrors,
    WriteErrors,
    SyncErrors,
    Clocks,
    Mixed,
}

impl Fault {
    /// Each with its name, and how often it is drawn.
    pub(super) const ALL: [(Self, &'static str, u64); 28] = [
        (Self::None, "none", 1),
        (Self::KillSource, "kill-source", 8),
        (Self::KillDestination, "kill-destination", 8),
        (Self::KillBoth, "kill-both", 8),
        (Self::KillAgain, "kill-again", 6),
        (Self::KillCommand, "kill-command", 3),
        (Self::Cancel, "cancel", 3),
        (Self::PowerSource, "power-source", 6),
        (Self::PowerDestination, "power-destination", 6),
        (Self::PowerBoth, "power-both", 6),
        (Self::PowerAgain, "power-again", 4),
        (Self::Cut, "cut", 6),
        (Self::Cuts, "cuts", 5),
        (Self::HalfOpen, "half-open", 4),
        (Self::Slow, "slow", 3),
        (Self::Reorder, "reorder", 4),
        (Self::Late, "late", 4),
        (Self::Unplug, "unplug", 3),
        (Self::FullDisk, "full-disk", 2),
        (Self::FullRecordSource, "full-record-source", 2),
        (Self::FullRecordDestination, "full-record-destination", 2),
        (Self::DeadRecordSource, "dead-record-source", 3),
        (Self::DeadRecordDestination, "dead-record-destination", 3),
        (Self::ReadErrors, "read-errors", 2),
        (Self::WriteErrors, "write-errors", 2),
        (Self::SyncErrors, "sync-errors", 2),
        (Self::Clocks, "clocks", 2),
        (Self::Mixed, "mixed", 6),
    ];

    pub(super) fn name(self) -> &'static str {
        Self::ALL.iter().find(|row| row.0 == self).map_or("?", |row| row.1)
    }

    pub(super) fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|row| row.1 == name).map(|row| row.0)
    }

    /// The fault of a seed.
    pub(super) fn drawn(seed: u64) -> Self {
        let mut left = Dice::new(seed ^ 0xfa17).below(Self::ALL.iter().map(|row| row.2).sum());
        for (fault, _, weight) in Self::ALL {
            if left < weight {
                return fault;
            }
            left -= weight;
        }
        Self::None
    }

    /// What this machine lacks for it.
    pub(super) fn missing(self) -> Option<&'static str> {
        match self {
            Self::PowerSource | Self::PowerDestination | Self::PowerBoth | Self::PowerAgain => media::no_mounts(),
            Self::FullDisk | Self::FullRecordSource | Self::FullRecordDestination => media::no_mounts(),
            Self::DeadRecordSource | Self::DeadRecordDestination | Self::SyncErrors => media::no_mounts(),
            Self::ReadErrors | Self::WriteErrors => media::no_failing().or_else(media::no_mounts),
            Self::Unplug => media::no_namespaces(),
            Self::Clocks => media::no_clocks(),
            _ => None,
        }
    }
}

/// One of the hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Source,
    Destination,
    /// Where the guest goes afterwards, in some rounds.
    Third,
}

impl Side {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Source => "a",
            Self::Destination => "b",
            Self::Third => "c",
        }
    }
}

/// What a host stands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ground {
    /// The file system of the build.
    Plain,
    /// One of its own, in memory.
    Own,
    LosesPower,
    SmallDisk,
    ThinDisk,
    SmallState,
    FailingReads,
    /// So many percent of the writes.
    FailingWrites(u64),
}

/// When something happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum When {
    /// A message comes by: before it passes, or after.
    Message { number: u8, passes: bool, later: Duration },
    /// So long after the migration was asked for.
    Time(Duration),
    /// Something happens in the directory of a record: the so manieth time a temporary file is made, or renamed.
    Record { side: Side, renamed: bool, count: u32 },
}

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Deed {
    Kill(Side),
    KillBoth,
    KillCommand,
    Power(Side),
    PowerBoth,
    Cancel,
    /// All connections are cut; with `true` nobody gets through until the link is healed.
    Cut(bool),
    /// One connection is cut, whichever.
    CutOne(u64),
    /// Nothing passes, without a sign; with `true` only on the connections that are open.
    Silence(bool),
    /// One data connection is held while others pass.
    Hold(u64),
    /// What is sent on data connections is kept, the source loses them, and it is delivered when new ones are open.
    Late,
    Delay(Duration),
    Throttle(u64),
    Unplug,
    Fill(Side, bool),
    Freeze(Side),
    Fail(Side),
}

/// One thing that happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Blow {
    pub(super) when: When,
    pub(super) deed: Deed,
}

impl Blow {
    /// At which moment it kills a process of `serve`, without the microseconds.
    pub(super) fn death(&self) -> Option<String> {
        let dies = matches!(self.deed, Deed::Kill(_) | Deed::KillBoth | Deed::Power(_) | Deed::PowerBoth);
        let moment = match self.when {
            When::Message { number, passes, .. } => When::Message { number, passes, later: Duration::ZERO }.to_string(),
            When::Time(_) => "at a time".to_owned(),
            record @ When::Record { .. } => record.to_string(),
        };
        dies.then(|| format!("death {moment}"))
    }
}

/// A round.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) seed: u64,
    pub(super) fault: Fault,
    pub(super) blows: Vec<Blow>,
    /// What happens so long after the dead hosts were started again, and after what happened then.
    pub(super) again: Vec<(Duration, Deed)>,
    /// What is healed so long after the first blow.
    pub(super) heals_after: Duration,
    pub(super) grounds: [Ground; 2],
    pub(super) source_listens: bool,
    /// An operator asks with `recover` where it is not known who owns.
    pub(super) operator_asks: bool,
    pub(super) clocks_jump: bool,
    pub(super) cable: bool,
    pub(super) third: bool,
    pub(super) overwrite: bool,
    /// Of `migrate`; 0 is no limit.
    pub(super) bandwidth_mib: u64,
    pub(super) connections: u64,
    /// Percent of the disk that hold data.
    pub(super) full: u64,
    pub(super) rate: u32,
}

/// The messages of a migration that ends well, in their order.
const STEPS: [u8; 8] = [
    message::PREPARE,
    message::PREPARED,
    message::DATA,
    message::SEAL,
    message::SEALED,
    message::GO,
    message::RUNNING,
    message::SEALED,
];

impl Plan {
    pub(super) fn drawn(seed: u64, fault: Fault) -> Self {
        let mut dice = Dice::new(seed ^ ((fault as u64 + 1) << 40));
        let mut plan = Self {
            seed,
            fault,
            blows: Vec::new(),
            again: Vec::new(),
            heals_after: Duration::from_millis(50 + dice.below(500)),
            grounds: [0; 2].map(|_| if dice.below(4) == 0 { Ground::Plain } else { Ground::Own }),
            source_listens: dice.below(3) > 0,
            operator_asks: dice.below(4) > 0,
            clocks_jump: false,
            cable: false,
            third: dice.below(6) == 0,
            overwrite: dice.below(4) == 0,
            bandwidth_mib: [0, 40, 80, 200][pick(&mut dice, 4)],
            connections: 1 + dice.below(3),
            full: [10, 30, 60][pick(&mut dice, 3)],
            rate: [200, 800, 3000][pick(&mut dice, 3)],
        };
        plan.draw(fault, &mut dice);
        plan
    }

    fn draw(&mut self, fault: Fault, dice: &mut Dice) {
        match fault {
            Fault::None => {}
            Fault::KillSource => self.dies(dice, Deed::Kill(Side::Source)),
            Fault::KillDestination => self.dies(dice, Deed::Kill(Side::Destination)),
            Fault::KillBoth => self.dies(dice, Deed::KillBoth),
            Fault::KillAgain | Fault::PowerAgain => {
                let deeds = if fault == Fault::KillAgain {
                    [Deed::Kill(Side::Source), Deed::Kill(Side::Destination), Deed::KillBoth]
                } else {
                    self.grounds = [Ground::LosesPower; 2];
                    [Deed::Power(Side::Source), Deed::Power(Side::Destination), Deed::PowerBoth]
                };
                // Once at the hand-over, and again while the hosts find out what became of it.
                let number = [message::SEAL, message::SEALED, message::GO, message::RUNNING][pick(dice, 4)];
                self.add(message(number, dice), deeds[pick(dice, 3)]);
                for _ in 0..1 + dice.below(2) {
                    self.again.push((Duration::from_micros(dice.below(60_000)), deeds[pick(dice, 3)]));
                }
            }
            Fault::KillCommand => self.dies(dice, Deed::KillCommand),
            Fault::Cancel => self.dies(dice, Deed::Cancel),
            Fault::PowerSource => {
                self.grounds[0] = Ground::LosesPower;
                self.dies(dice, Deed::Power(Side::Source));
            }
            Fault::PowerDestination => {
                self.grounds[1] = Ground::LosesPower;
                self.dies(dice, Deed::Power(Side::Destination));
            }
            Fault::PowerBoth => {
                self.grounds = [Ground::LosesPower; 2];
                self.dies(dice, Deed::PowerBoth);
            }
            Fault::Cut => {
                let when = self.moment(dice);
                let deed = if dice.below(3) == 0 { Deed::CutOne(dice.roll()) } else { Deed::Cut(dice.below(2) == 0) };
                self.add(when, deed);
            }
            Fault::Cuts => {
                for _ in 0..2 + dice.below(5) {
                    let when = self.moment(dice);
                    let deed = if dice.below(4) == 0 { Deed::Cut(false) } else { Deed::CutOne(dice.roll()) };
                    self.add(when, deed);
                }
            }
            Fault::HalfOpen => {
                let when = self.moment(dice);
                self.add(when, Deed::Silence(dice.below(2) == 0));
            }
            Fault::Slow => {
                let delay = Deed::Delay(Duration::from_millis(1 + dice.below(40)));
                let throttle = Deed::Throttle((8 << 20) + dice.below(64 << 20));
                self.add(When::Time(Duration::ZERO), if dice.below(2) == 0 { delay } else { throttle });
                self.heals_after = Duration::from_millis(800);
            }
            Fault::Reorder => {
                self.connections = 2 + dice.below(3);
                let deeds = [0; 3].map(|_| Deed::Hold(dice.roll()));
                for deed in deeds.into_iter().take(1 + pick(dice, 3)) {
                    self.add(When::Time(Duration::from_millis(20 + dice.below(300))), deed);
                }
            }
            Fault::Late => {
                // In the later passes, too, where the same places are sent again and again.
                (self.bandwidth_mib, self.full, self.rate) = (40, 10, 800);
                self.add(When::Time(Duration::from_millis(30 + dice.below(400))), Deed::Late);
                self.heals_after = Duration::from_secs(2);
            }
            Fault::Unplug => {
                self.cable = true;
                self.source_listens = dice.below(4) > 0;
                let when = self.moment_without_messages(dice);
                self.add(when, Deed::Unplug);
                if dice.below(2) == 0 {
                    let when = self.moment_without_messages(dice);
                    let side = if dice.below(2) == 0 { Side::Source } else { Side::Destination };
                    self.add(when, Deed::Kill(side));
                }
            }
            Fault::FullDisk => {
                self.grounds[1] = Ground::SmallDisk;
                let number = [message::PREPARE, message::DATA, message::DATA][pick(dice, 3)];
                self.add(message(number, dice), Deed::Fill(Side::Destination, false));
            }
            Fault::FullRecordSource | Fault::FullRecordDestination => {
                let side = self.small_state(fault == Fault::FullRecordSource);
                let when = self.moment(dice);
                self.add(when, Deed::Fill(side, true));
            }
            Fault::DeadRecordSource | Fault::DeadRecordDestination => {
                let side = self.small_state(fault == Fault::DeadRecordSource);
                let when = self.moment(dice);
                self.add(when, Deed::Freeze(side));
            }
            Fault::ReadErrors => {
                self.grounds[0] = Ground::FailingReads;
                self.full = 60;
                self.add(message(message::PREPARED, dice), Deed::Fail(Side::Source));
            }
            Fault::WriteErrors => {
                self.grounds[1] = Ground::FailingWrites([1, 5, 100][pick(dice, 3)]);
                self.overwrite = true;
                self.full = 60;
                self.add(message(message::DATA, dice), Deed::Fail(Side::Destination));
            }
            Fault::SyncErrors => {
                // Full beneath its own file system: what is written is taken in, and fails when it is synced.
                self.grounds[1] = Ground::ThinDisk;
                self.full = 60;
            }
            Fault::Clocks => {
                self.clocks_jump = true;
                let deed = [Deed::Kill(Side::Source), Deed::Kill(Side::Destination), Deed::KillBoth][pick(dice, 3)];
                self.dies(dice, deed);
            }
            Fault::Mixed => {
                let link = [Fault::Cut, Fault::Cuts, Fault::HalfOpen, Fault::Slow, Fault::Cancel][pick(dice, 5)];
                let death = [Fault::KillSource, Fault::KillDestination, Fault::KillBoth, Fault::KillCommand];
                self.draw(link, dice);
                self.draw(death[pick(dice, 4)], dice);
            }
        }
    }

    fn small_state(&mut self, source: bool) -> Side {
        self.grounds[usize::from(!source)] = Ground::SmallState;
        if source { Side::Source } else { Side::Destination }
    }

    pub(super) fn ground(&self, side: Side) -> Ground {
        match side {
            Side::Source => self.grounds[0],
            Side::Destination => self.grounds[1],
            Side::Third => Ground::Plain,
        }
    }

    fn add(&mut self, when: When, deed: Deed) {
        self.blows.push(Blow { when, deed });
    }

    /// `deed` at any moment of a migration, also at those that only another fault brings.
    fn dies(&mut self, dice: &mut Dice, deed: Deed) {
        let when = match dice.below(10) {
            0 => {
                // A connection is lost, and mended: the fence.
                self.bandwidth_mib = 40;
                self.full = 60;
                self.add(When::Time(Duration::from_millis(60 + dice.below(200))), Deed::CutOne(dice.roll()));
                message([message::FENCE, message::FENCED][pick(dice, 2)], dice)
            }
            1 if deed != Deed::Cancel => {
                // It is cancelled: the abort.
                self.bandwidth_mib = 40;
                self.add(When::Time(Duration::from_millis(10 + dice.below(300))), Deed::Cancel);
                message([message::ABORT, message::UNSEALED][pick(dice, 2)], dice)
            }
            _ => self.moment(dice),
        };
        self.add(when, deed);
    }

    fn moment(&mut self, dice: &mut Dice) -> When {
        if dice.below(2) == 0 { message(STEPS[pick(dice, 8)], dice) } else { self.moment_without_messages(dice) }
    }

    fn moment_without_messages(&mut self, dice: &mut Dice) -> When {
        if dice.below(3) > 0 {
            let side = if dice.below(2) == 0 { Side::Source } else { Side::Destination };
            let count = u32::try_from(dice.below(4)).unwrap_or(0);
            return When::Record { side, renamed: dice.below(2) == 0, count };
        }
        let most = if self.bandwidth_mib == 0 { 250 } else { 700 };
        When::Time(Duration::from_micros(dice.below(most * 1000)))
    }
}

fn pick(dice: &mut Dice, count: u64) -> usize {
    usize::try_from(dice.below(count)).unwrap_or(0)
}

fn message(number: u8, dice: &mut Dice) -> When {
    let later = [Duration::ZERO, Duration::from_micros(dice.below(3000))][pick(dice, 2)];
    When::Message { number, passes: dice.below(2) == 0, later }
}

fn message_name(number: u8) -> &'static str {
    match number {
        message::PREPARE => "PREPARE",
        message::PREPARED => "PREPARED",
        message::FENCE => "FENCE",
        message::FENCED => "FENCED",
        message::SEAL => "SEAL",
        message::SEALED => "SEALED",
        message::GO => "GO",
        message::RUNNING => "RUNNING",
        message::ABORT => "ABORT",
        message::UNSEALED => "UNSEALED",
        _ => "data",
    }
}

impl fmt::Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Message { number, passes, later } => {
                let order = if *passes { "after" } else { "before" };
                write!(f, "{order} {}", message_name(*number))?;
                if later.is_zero() { Ok(()) } else { write!(f, " and {} us", later.as_micros()) }
            }
            Self::Time(time) => write!(f, "at {} ms", time.as_millis()),
            Self::Record { side, renamed, count } => {
                let what = if *renamed { "commit" } else { "temporary file" };
                write!(f, "at {what} {count} of {}", side.name())
            }
        }
    }
}

impl fmt::Display for Blow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.deed, self.when)
    }
}
