//! Why the rules D1, D2, D4 and D5 say what they say, by trying every order.
//!
//! One granule, guest writers and a mirror, each a short program of steps. [`find`] tries every interleaving,
//! breadth first, and looks after each step whether a write is [`lost`]. For the rule's own order none is; for each
//! other order the shortest counter-example stands here. The dirty map, the export and the mirror are the code.

use std::collections::{HashSet, VecDeque};

/// Everything there is: one granule here and there, its place in the map, and what each thread remembers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct World {
    /// Which write the granule holds, 0 before the first; here, there, and in the mirror's buffer.
    source: usize,
    destination: usize,
    buffer: usize,
    /// What is under way on two connections, for as long as the destination can still write it.
    wire: [Option<usize>; 2],
    /// The map: marked; copies taken and not acknowledged; granules that are either, as one counter (rule D5).
    dirty: bool,
    taken: u8,
    counter: u8,
    /// Set up: the map is armed, the extents have been asked for.
    armed: bool,
    scanned: bool,
    /// The guest: a write inside the gate, one that the drain waits for, what it knows of "armed?", who has a reply.
    inside: bool,
    waited_for: bool,
    saw_armed: bool,
    replied: [bool; 3],
    /// What an observer has seen, and what it says.
    saw_dirty: bool,
    saw_taken: bool,
    ready: bool,
}

impl World {
    /// What connection `i` carries, and carries no more.
    fn land(&mut self, i: usize) -> usize {
        self.wire[i].take().unwrap_or(0)
    }
}

/// A step: its name, when it can be taken, and what it does.
type Step = (&'static str, fn(&World) -> bool, fn(&mut World));

fn step(name: &'static str, act: fn(&mut World)) -> Step {
    (name, |_| true, act)
}

/// The shortest interleaving of the programs after which `bad` holds; empty when there is none.
fn find(start: World, programs: &[&[Step]], bad: fn(&World) -> bool) -> String {
    let begin = vec![0; programs.len()];
    let mut seen = HashSet::from([(start.clone(), begin.clone())]);
    let mut queue = VecDeque::from([(start, begin, String::new())]);
    while let Some((world, at, trace)) = queue.pop_front() {
        if bad(&world) {
            return trace.trim_start().to_owned();
        }
        for (who, program) in programs.iter().enumerate() {
            let Some((name, _, act)) = program.get(at[who]).filter(|(_, can, _)| can(&world)) else { continue };
            let (mut world, mut at) = (world.clone(), at.clone());
            act(&mut world);
            at[who] += 1;
            if seen.insert((world.clone(), at.clone())) {
                queue.push_back((world, at, format!("{trace} {name}")));
            }
        }
    }
    String::new()
}

/// The guest was told that the write is done; it is not at the destination, and nobody will send it.
fn lost(w: &World) -> bool {
    w.replied[w.source] && w.source != w.destination && !w.dirty && w.taken == 0
}

/// Every order of three steps, the given one first.
fn orders(s: [Step; 3]) -> [[Step; 3]; 6] {
    [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]].map(|order| order.map(|i| s[i]))
}

fn guest_1() -> [Step; 3] {
    [step("write", |w| w.source = 1), step("mark", |w| w.dirty = true), step("reply", |w| w.replied[1] = true)]
}

fn guest_2() -> [Step; 3] {
    [step("write2", |w| w.source = 2), step("mark2", |w| w.dirty = true), step("reply2", |w| w.replied[2] = true)]
}

fn read() -> Step {
    step("read", |w| w.buffer = w.source)
}

fn clear_read_send() -> [Step; 3] {
    [step("clear", |w| w.dirty = false), read(), step("send", |w| w.destination = w.buffer)]
}

/// Three times: take the granule when it is dirty, do the steps, be done with it.
fn mirror(order: [Step; 3]) -> Vec<Step> {
    let take: Step = ("take", |w| w.dirty, |w| w.taken = 1);
    [&[take][..], &order, &[step("done", |w| w.taken = 0)]].concat().repeat(3)
}

#[test]
fn d2_the_guest_writes_then_marks_then_replies() {
    let both = orders(guest_1()).into_iter().zip(orders(guest_2()));
    let found = both.map(|(one, two)| find(World::default(), &[&one, &two, &mirror(clear_read_send())], lost));
    let expected = [
        "",
        "write reply", // and whoever says "ready" now is wrong
        "mark take clear read write reply send done",
        "mark reply take clear read write send done",
        "reply write",
        "reply mark take clear read write send done",
    ];
    assert_eq!(found.collect::<Vec<_>>(), expected);
}

#[test]
fn d2_the_mirror_clears_then_reads_then_sends() {
    let found =
        orders(clear_read_send()).map(|order| find(World::default(), &[&guest_1(), &guest_2(), &mirror(order)], lost));
    let expected = [
        "",
        "write mark reply take clear send read done",
        "write mark take read write2 mark2 reply2 clear send done",
        "write mark take read write2 mark2 reply2 send clear done",
        "write mark reply take send clear read done",
        "write mark reply take send read clear done",
    ];
    assert_eq!(found, expected);
}

#[test]
fn d1_arm_then_drain_then_scan() {
    // A guest write looks at "armed?" when it enters the gate, and marks if it was.
    let guest = [
        step("enter", |w| (w.inside, w.saw_armed) = (true, w.armed)),
        step("write", |w| w.source = 1),
        step("mark?", |w| w.dirty |= w.saw_armed),
        step("reply", |w| (w.inside, w.replied[1]) = (false, true)),
    ];
    let arm = step("arm", |w| w.armed = true);
    // Waits for who is inside when it begins, not for who comes later.
    let drain = step("drain", |w| w.waited_for = w.inside);
    let drained: Step = ("drained", |w| !(w.waited_for && w.inside), |w| w.waited_for = false);
    // The bulk pass copies what is data now.
    let scan = step("scan", |w| (w.scanned, w.dirty) = (true, w.dirty || w.source != 0));
    let orders: [&[Step]; 4] =
        [&[arm, drain, drained, scan], &[arm, scan], &[drain, drained, arm, scan], &[scan, arm, drain, drained]];
    let found = orders.map(|set_up| {
        let copier = [set_up, &mirror(clear_read_send())].concat();
        find(World::default(), &[&guest, &copier], |w| w.scanned && lost(w))
    });
    let expected = [
        "",
        "enter arm scan write mark? reply",
        "drain enter drained arm scan write mark? reply",
        "enter scan write mark? reply",
    ];
    assert_eq!(found, expected);
}

#[test]
fn d4_two_copies_of_one_granule_are_never_under_way() {
    let take_alone: Step = ("take", |w| w.dirty && w.taken == 0, |w| (w.dirty, w.taken) = (false, 1));
    let take_any: Step = ("take", |w| w.dirty, |w| (w.dirty, w.taken) = (false, w.taken + 1));
    let send = [step("send@1", |w| w.wire[0] = Some(w.buffer)), step("send@2", |w| w.wire[1] = Some(w.buffer))];
    // A connection delivers when it likes, and acknowledges at once.
    let deliver: [Step; 2] = [
        ("write@1", |w| w.wire[0].is_some(), |w| (w.destination, w.taken) = (w.land(0), w.taken - 1)),
        ("write@2", |w| w.wire[1].is_some(), |w| (w.destination, w.taken) = (w.land(1), w.taken - 1)),
    ];
    let try_all = |mirror: &[Step], first: Step| {
        find(World::default(), &[&guest_1(), &guest_2(), mirror, &[first], &[deliver[1]]], lost)
    };
    let twice = |take: Step| try_all(&[take, read(), send[0], take, read(), send[1]], deliver[0]);
    assert_eq!(twice(take_alone), "");
    assert_eq!(twice(take_any), "write mark take read write2 mark2 reply2 send@1 take read send@2 write@2 write@1");

    // Connection 1 is lost with a copy on it. What the destination has received of it may still be written, and
    // nobody hears of it; after the fence nothing is. Only then may the granule be given back.
    let late: Step = ("late@1", |w| w.wire[0].is_some(), |w| w.destination = w.land(0));
    let fence = step("fence", |w| w.wire[0] = None);
    let give_back = step("give-back", |w| (w.dirty, w.taken) = (true, 0));
    let again = |middle: &[Step]| {
        let mirror = [&[take_alone, read(), send[0]], middle, &[take_alone, read(), send[1]]].concat();
        try_all(&mirror, late)
    };
    assert_eq!(again(&[fence, give_back]), "");
    let unfenced = "write mark take read write2 mark2 reply2 send@1 give-back take read send@2 write@2 late@1";
    assert_eq!(again(&[give_back]), unfenced);
}

#[test]
fn d5_ready_is_one_counter() {
    // The granule is dirty, nobody writes any more. The mirror takes it, gives it back, takes it again.
    let start = World { source: 1, dirty: true, counter: 1, ..World::default() };
    let take = step("take", |w| (w.dirty, w.taken) = (false, 1));
    let give_back = step("give-back", |w| (w.dirty, w.taken) = (true, 0));
    let acknowledge = step("acknowledge", |w| (w.destination, w.taken, w.counter) = (w.source, 0, 0));
    let mirror = [take, give_back, take, acknowledge];
    let dirty = step("dirty?", |w| w.saw_dirty = w.dirty);
    let taken = step("taken?", |w| w.saw_taken = w.taken > 0);
    let say = step("ready", |w| w.ready = !w.saw_dirty && !w.saw_taken);
    let counter = step("counter?", |w| w.ready = w.counter == 0);
    let observers: [&[Step]; 3] = [&[counter], &[dirty, taken, say], &[taken, dirty, say]];
    let found = observers.map(|o| find(start.clone(), &[&mirror, o], |w| w.ready && w.source != w.destination));
    assert_eq!(found, ["", "take dirty? give-back taken? ready", "taken? take dirty? ready"]);
}
