//! One round, from its two hosts to the second migration.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::check;
use super::media::{Cable, unique};
use super::plan::{Blow, Deed, Fault, Ground, Plan, Side, When};
use super::site::{DISK, GUEST, SIZE, Site};
use super::stage::Stage;
use crate::harness::pause;
use crate::host::{Migration, Watch};
use crate::relay::Relay;
use crate::writer::{Ledger, Load, Mix, OnLoss, Writer};

/// Longest time of a `migrate` whose hosts and link are well again.
const MIGRATE: Duration = Duration::from_secs(90);
/// When everything is healed though nothing that was waited for has come.
const UNSTRUCK: Duration = Duration::from_secs(2);
/// A blow that waits for what may follow the command's end has so much time.
const AFTER: Duration = Duration::from_millis(100);

/// How a round went.
#[derive(Debug, Clone)]
pub(super) struct Outcome {
    pub(super) exit: Option<i32>,
    pub(super) owner: Side,
    pub(super) struck: Vec<Blow>,
    pub(super) acknowledged: u64,
}

/// What tells of a round that failed.
#[derive(Debug, Default)]
pub(super) struct Witness {
    pub(super) stage: Option<Arc<Stage>>,
    pub(super) third: Option<Arc<Site>>,
}

/// Runs a round in these folders: one for sockets and logs, one on a disk.
pub(super) fn run(plan: &Plan, places: (&Path, &Path), witness: &mut Witness) -> Result<Outcome, String> {
    let (stage, ledger) = set(plan, places)?;
    witness.stage = Some(Arc::clone(&stage));
    let (a, b) = (&stage.a, &stage.b);
    let made = !b.image.exists();
    a.start()?;
    let claimed = a.ask(&["claim"]);
    if claimed.code != Some(0) {
        return Err(format!("claim: {}", claimed.stderr));
    }
    b.start()?;
    if plan.grounds.contains(&Ground::LosesPower) {
        for site in [a, b] {
            let folder = site.image.parent().unwrap_or(places.1);
            File::open(folder).and_then(|folder| Ok(rustix::fs::syncfs(folder)?)).map_err(|error| error.to_string())?;
        }
    }
    let writer = Writer::start(load(plan), ledger, DISK, &[&a.door(), &b.door()]);
    writer.until_more(20);
    let watch = watch(a, b);

    stage.tell("migrate");
    stage.arm(plan);
    let to = stage.relay.as_ref().map_or(&b.address, |relay| &relay.address);
    *stage.migration() = Some(Migration::start(a.command(&["migrate", to, "--json"]).args(options(plan, b))));
    let ended = end_of_migration(&stage, plan, &writer)?;
    stage.tell(&format!("migrate ended with {:?}: {}", ended.code, ended.stderr.trim_end()));

    let (owner, standings) = check::settled(a, b, plan.operator_asks)?;
    stage.tell(&format!("{} owns; a is {}, b is {}", owner.name(), standings[0].state, standings[1].state));
    check::truthful(ended.code, &ended.stderr, owner)?;
    writer.until_more(20);
    let ledger = writer.finish();
    let (here, other) = if owner == Side::Source { (a, b) } else { (b, a) };
    check::whole(&ledger, here)?;
    let frozen = plan.blows.iter().any(|blow| matches!(blow.deed, Deed::Freeze(_)));
    check::leftovers(a, &standings[0], false, frozen)?;
    check::leftovers(b, &standings[1], made, frozen)?;
    check::one_takes(here, &[other])?;
    let acknowledged = ledger.acknowledged();
    watch.finish();

    again(plan, places, &stage, (here, other), ledger, witness)?;
    let _ = (a.kill(), b.kill());
    Ok(Outcome { exit: ended.code, owner, struck: stage.struck(), acknowledged })
}

/// Looks all the time whether both serve.
fn watch(from: &Site, to: &Site) -> Watch {
    Watch::over([to, from].map(|site| (GUEST.to_owned(), site.control())))
}

/// Makes hosts, link and disks.
pub(super) fn set(plan: &Plan, places: (&Path, &Path)) -> Result<(Arc<Stage>, Ledger), String> {
    let cable = if plan.cable { Some(Cable::lay()?) } else { None };
    // Addresses of their own, so that nobody else takes the port while a host is down.
    let own = [1, 2].map(|end| loopback(plan, end));
    let ends = cable.as_ref().map_or([own[0].as_str(), own[1].as_str()], |cable| cable.ends);
    let mut ledger = None;
    let a = Site::new(places, Side::Source, plan, (ends[0], cable.as_ref()), |image| {
        ledger = Some(Ledger::format(image, SIZE, plan.seed, plan.full));
    })?;
    let b = Site::new(places, Side::Destination, plan, (ends[1], cable.as_ref()), |image| {
        // Something else, that must be gone afterwards.
        let stale = matches!(plan.ground(Side::Destination), Ground::Plain | Ground::Own | Ground::LosesPower);
        if plan.overwrite && stale {
            drop(Ledger::format(image, SIZE, plan.seed ^ 1, 20));
        }
    })?;
    let relay = if plan.cable { None } else { Some(Relay::to(&b.address)) };
    let mut ledger = ledger.ok_or("no disk")?;
    ledger.track();
    Ok((Arc::new(Stage::new(a, b, relay, cable)), ledger))
}

/// An address on this machine that no other round has.
fn loopback(plan: &Plan, end: u64) -> String {
    let name = unique("");
    let serial: u64 = name.rsplit('x').next().and_then(|serial| serial.parse().ok()).unwrap_or(plan.seed);
    format!("127.{}.{}.{}", 1 + std::process::id() % 250, 1 + serial / 80 % 250, 1 + serial % 80 * 3 + end)
}

pub(super) fn load(plan: &Plan) -> Load {
    let power = plan.grounds.contains(&Ground::LosesPower);
    let mix = if power { Mix::DURABLE } else { Mix::ALL };
    Load {
        seed: plan.seed,
        connections: if power { 1 } else { 2 },
        depth: 8,
        mix,
        rate: plan.rate,
        on_loss: OnLoss::Follow,
    }
}

/// What `migrate` is told.
fn options(plan: &Plan, to: &Site) -> Vec<String> {
    let mut words = vec!["--downtime-limit".to_owned(), "1000".to_owned()];
    words.extend(["--connections".to_owned(), plan.connections.to_string()]);
    if plan.bandwidth_mib > 0 {
        words.extend(["--bandwidth".to_owned(), format!("{}M", plan.bandwidth_mib)]);
    }
    if to.image.exists() {
        words.push("--overwrite".to_owned());
    }
    if plan.cable {
        words.push("--insecure-plaintext".to_owned());
    }
    words
}

/// Waits for the end of the command; heals what was struck when it is time for that, and at the end.
fn end_of_migration(stage: &Arc<Stage>, plan: &Plan, writer: &Writer) -> Result<crate::host::Ended, String> {
    let began = Instant::now();
    let mut healed = 0;
    while !stage.is_over() {
        if began.elapsed() > MIGRATE {
            return Err(format!("migrate goes on after {MIGRATE:?}"));
        }
        let due = stage.first().map_or(began + UNSTRUCK, |first| first + plan.heals_after);
        if Instant::now() > due && healed < stage.struck().len() {
            healed = stage.struck().len();
            stage.tell("healed");
            stage.mend()?;
            revive(stage, writer)?;
        }
        pause(Duration::from_millis(2));
    }
    let over = Instant::now();
    while stage.struck().len() < plan.blows.len() && over.elapsed() < AFTER {
        pause(Duration::from_millis(2));
    }
    let wait = stage.first().map(|first| (first + plan.heals_after).saturating_duration_since(Instant::now()));
    pause(wait.unwrap_or_default());
    for (later, deed) in plan.again.iter().copied() {
        stage.mend()?;
        revive(stage, writer)?;
        pause(later);
        stage.strike(Blow { when: When::Time(began.elapsed()), deed });
    }
    stage.close();
    stage.mend()?;
    if plan.fault == Fault::SyncErrors {
        replace(&stage.b)?;
    }
    revive(stage, writer)?;
    stage.tell("all is well again");
    let migration = stage.migration().take().ok_or("no migration")?;
    Ok(migration.wait())
}

/// A disk that failed in a sync is taken out.
fn replace(site: &Site) -> Result<(), String> {
    site.kill();
    let mount = site.image.parent().ok_or("no folder")?.to_owned();
    site.stands().replace_disk(&mount)
}

/// Starts every host again that is dead. If an owner's power was lost, what it holds now is what there is.
fn revive(stage: &Stage, writer: &Writer) -> Result<(), String> {
    for (door, site) in [&stage.a, &stage.b].into_iter().enumerate() {
        while site.is_dead() {
            if site.has_lost_power() {
                survey(stage, writer, door, site)?;
            }
            site.start()?;
        }
    }
    Ok(())
}

fn survey(stage: &Stage, writer: &Writer, door: usize, site: &Site) -> Result<(), String> {
    // What was acknowledged before is known before anybody looks.
    writer.until_left(door);
    let standing = site.who_owns();
    stage.tell(&format!("{} lost its power and is {}", site.name, standing.state));
    if !matches!(standing.state.as_str(), "owner" | "offered") {
        return Ok(());
    }
    let file = File::open(&site.image).map_err(|error| error.to_string())?;
    let read = |offset: u64, buffer: &mut [u8]| {
        std::os::unix::fs::FileExt::read_exact_at(&file, buffer, offset).expect("read");
    };
    let report = writer.with_ledger(|ledger| ledger.survive(door, read));
    if report.wrong > 0 {
        return Err(format!("after the power loss of {}: {report}", site.name));
    }
    Ok(())
}

/// A second migration, without a fault, from wherever the guest is.
fn again(
    plan: &Plan,
    places: (&Path, &Path),
    stage: &Stage,
    (from, other): (&Site, &Site),
    ledger: Ledger,
    witness: &mut Witness,
) -> Result<(), String> {
    let third = if plan.third && !plan.cable {
        let site = Arc::new(Site::new(places, Side::Third, plan, (&loopback(plan, 0), None), |_| {})?);
        witness.third = Some(Arc::clone(&site));
        site.start()?;
        Some(site)
    } else {
        None
    };
    let to = third.as_deref().unwrap_or(other);
    if !to.listens.swap(true, std::sync::atomic::Ordering::Relaxed) {
        to.kill();
        to.start()?;
    }
    let load = Load { mix: Mix::ALL, rate: 500, ..load(plan) };
    let writer = Writer::start(load, ledger, DISK, &[&from.door(), &to.door()]);
    writer.until_more(5);
    let options = options(&Plan { bandwidth_mib: 0, ..plan.clone() }, to);
    let watch = watch(from, to);
    stage.tell(&format!("migrate again, from {} to {}", from.name, to.name));
    let ended = Migration::start(from.command(&["migrate", &to.address, "--json"]).args(options)).wait();
    if ended.code != Some(0) {
        return Err(format!("the second migration ended with {:?}: {}", ended.code, ended.stderr));
    }
    writer.until_more(5);
    let ledger = writer.finish();
    watch.finish();
    check::whole(&ledger, to)?;
    let mut rest = vec![from];
    rest.extend(third.is_some().then_some(other));
    check::one_takes(to, &rest)?;
    for site in [to, from] {
        check::leftovers(site, &site.who_owns(), false, false)?;
    }
    if to.who_owns().exit != 0 || from.who_owns().exit != 4 {
        return Err(format!("after the second migration: {}; {}", to.who_owns().said, from.who_owns().said));
    }
    Ok(())
}
