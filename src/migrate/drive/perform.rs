//! PERFORM: arms the maps, starts lanes and checkers, and copies until the final pass would be short enough.
//!
//! Called by `drive::run` after PREPARE; `finish.rs` comes back to `copy_until_converged` when a switchover is put off.

use super::*;
use crate::layers::Layers;

impl Drive<'_> {
    /// Copies until the final pass would be short enough, and, with `--hold`, until somebody says switch.
    pub(super) fn perform(&mut self) -> Result<(), Stop> {
        let way = match &self.stream {
            Some(present) => verify::Way::Inside(Arc::clone(present)),
            None => verify::Way::Dial(self.job.address.clone()),
        };
        let bells = Checkers::bells(self.job.exports.len(), &way);
        let mut causes = base::Causes::default();
        let mut layers = std::mem::take(&mut self.layers).into_iter();
        for (number, (export, ready)) in self.job.exports.iter().zip(self.prepared.disks.clone()).enumerate() {
            let fault = |cause: String| format!("disk {}: {cause}", export.name());
            let verified = verified(self.job.request.verify);
            let compare = ready.compare && !ready.reads_as_zero;
            let plan = Plan { verified, compare, bell: Arc::clone(&bells[number % bells.len()]) };
            let mirror = Mirror::arm(export, &self.job.budget, &plan).map_err(fault)?;
            // D1: the first extent is asked for after arming.
            let cause = match layers.next() {
                Some(Ok(there)) => self.scan_over(&mirror, ready.reads_as_zero, there)?,
                there => base::scan(&mirror, ready.reads_as_zero, there),
            };
            causes.add(&mirror, cause.map_err(fault)?);
            self.mirrors.push(mirror);
        }
        causes.show(self.job);
        let peer = verify::Peer { guest: self.guest, way, stamp: self.stamp, instance: self.prepared.instance };
        self.checkers = Checkers::start(&peer, &self.mirrors, &bells)?;
        if let Err(NotYet::Stop(stop)) = self.open_stream() {
            return Err(stop);
        }
        self.compare()?;
        // A link that was lost meanwhile has brought them with it when it was mended.
        if !self.lanes.are_open() {
            match self.open_lanes() {
                Err(NotYet::GoOn(cause)) => self.recover(&cause)?,
                opened => opened?,
            }
        }
        self.copy_until_converged()
    }

    /// Asks for the layers here, which may take its time: the destination hears from us meanwhile, and a cancel is
    /// obeyed. A link that is lost is mended later.
    fn scan_over(&mut self, mirror: &Arc<Mirror>, zero: bool, there: Layers) -> Result<base::Scanned, Stop> {
        let (scanned, job) = (Arc::clone(mirror), self.job);
        let work = aside("layers", move || base::scan(&scanned, zero, Some(Ok(there))));
        wait_for(&work, TICK, || {
            let _ = self.listen_for(Duration::ZERO);
            job.cancelled().map_or(Ok(()), |cause| Err(Stop::Abort(cause)))
        })
    }

    /// D12: what the destination has already is found out first; what differs is dirty, and copied later.
    fn compare(&mut self) -> Result<(), Stop> {
        while self.mirrors.iter().any(|mirror| mirror.is_comparing()) {
            self.look()?;
            let counts = self.counts();
            self.show(&counts, Verdict::TooLong, false);
        }
        Ok(())
    }

    pub(super) fn copy_until_converged(&mut self) -> Result<(), Stop> {
        loop {
            self.look()?;
            let counts = self.counts();
            let now = self.course.assess(self.job, &self.mirrors, &mut self.meter, &counts);
            if now.bulk_over {
                let (copying, rates) = (self.meter.predicted_copying(&counts), self.meter.total());
                self.synchrony.look(copying, now.limit, rates, Instant::now());
            }
            self.show(&counts, now.verdict, now.converged);
            if now.may_switch(self.job) {
                return Ok(());
            }
            if now.bulk_over {
                self.course.flush(&self.mirrors);
            }
        }
    }
}
