//! Walks through all states, breadth first, so that the first thing that is wrong has the shortest story.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasherDefault, Hash, Hasher};
use std::time::{Duration, Instant};

use super::book::Book;
use super::checks::{self, Wrong};
use super::model::{self, Bounds, Move, Moves};
use super::mutants::Rules;
use super::operator;
use super::story::tell;
use super::world::World;

/// What an exploration found.
#[derive(Debug)]
pub(crate) struct Report {
    /// Different states.
    pub(crate) states: usize,
    /// Moves between them.
    pub(crate) transitions: usize,
    /// Different questions to the transition function.
    pub(crate) questions: usize,
    /// How long it took.
    pub(crate) took: Duration,
    /// What is wrong first.
    pub(crate) wrong: Option<CounterExample>,
}

/// The shortest way to something wrong.
#[derive(Debug)]
pub(crate) struct CounterExample {
    /// What is wrong.
    pub(crate) wrong: Wrong,
    /// How many moves lead there.
    pub(crate) moves: usize,
    /// The moves, with what each changes.
    pub(crate) story: String,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (states, transitions, seconds) = (self.states, self.transitions, self.took.as_secs_f64());
        write!(f, "{states:>9} states {transitions:>10} transitions {:>6} questions {seconds:>6.1} s", self.questions)
    }
}

/// All states so far, each with the one that led to it first.
struct Known {
    worlds: Vec<World>,
    parents: Vec<u32>,
    /// By the hash of the world; the next number where two share one.
    numbers: HashMap<u64, u32, BuildHasherDefault<Same>>,
}

impl Known {
    /// The number of a world, and whether it is new.
    fn number(&mut self, world: &World, parent: u32) -> (u32, bool) {
        let mut hasher = Mix::default();
        world.hash(&mut hasher);
        let mut key = hasher.finish();
        loop {
            match self.numbers.get(&key) {
                Some(&number) if self.worlds[number as usize] == *world => return (number, false),
                Some(_) => key = key.wrapping_add(1),
                None => {
                    let number = u32::try_from(self.worlds.len()).expect("fewer states than numbers");
                    self.numbers.insert(key, number);
                    self.worlds.push(*world);
                    self.parents.push(parent);
                    return (number, true);
                }
            }
        }
    }
}

impl Known {
    /// The worlds on the way to a state.
    fn path(&self, mut state: usize) -> Vec<World> {
        let mut path = vec![self.worlds[state]];
        while state != 0 {
            state = self.parents[state] as usize;
            path.push(self.worlds[state]);
        }
        path.reverse();
        path
    }
}

/// Explores everything within `bounds`, by `rules`, until something is wrong. `most`: more states than that are none of
/// a test's business.
pub(crate) fn explore(bounds: &Bounds, rules: Rules, most: usize) -> Report {
    let began = Instant::now();
    let mut book = Book::new(rules);
    let mut known = Known { worlds: Vec::new(), parents: Vec::new(), numbers: HashMap::default() };
    let first = model::beginning(&mut book, bounds);
    known.number(&first, 0);
    let mut edges = Edges::default();
    let mut wrong = None;
    let mut found = Vec::new();
    let mut next = 0;
    while next < known.worlds.len() {
        let world = known.worlds[next];
        if let Some(what) = checks::check(&mut book, bounds, &world) {
            wrong = Some((what, next));
            break;
        }
        assert!(known.worlds.len() <= most, "more than {most} states in {bounds:?}");
        let parent = u32::try_from(next).expect("checked");
        let moves = Moves::of(&mut book, bounds, world, found);
        found = moves.found;
        for (step, to) in &found {
            edges.add(known.number(to, parent).0, step);
        }
        edges.end();
        next += 1;
    }
    let wrong = wrong.or_else(|| no_way_out(&mut book, bounds, &known, &edges).map(|state| (Wrong::NoWayOut, state)));
    Report {
        states: known.worlds.len(),
        transitions: edges.to.len(),
        questions: book.questions(),
        took: began.elapsed(),
        wrong: wrong.map(|(wrong, state)| {
            let path = known.path(state);
            let story = tell(&mut book, bounds, &path);
            CounterExample { wrong, moves: path.len() - 1, story: format!("{story}   => {wrong}\n") }
        }),
    }
}

/// Where the moves out of each state lead.
#[derive(Default)]
struct Edges {
    /// The states that they lead to; see [`WORD`] and [`LATE`].
    to: Vec<u32>,
    /// Where the moves of each state end in `to`.
    ends: Vec<usize>,
}

/// The move is the operator's.
const WORD: u32 = 1 << 31;
/// The move needs a message that may be lost.
const LATE: u32 = 1 << 30;
const STATE: u32 = LATE - 1;

impl Edges {
    fn add(&mut self, to: u32, step: &Move) {
        let word = if step.is_word() { WORD } else { 0 };
        let late = if step.is_sure() { 0 } else { LATE };
        self.to.push(to | word | late);
    }

    fn end(&mut self) {
        self.ends.push(self.to.len());
    }

    /// All states from which one of `good` can be reached by what can be waited for, with the operator or without.
    fn backward(&self, mut good: Vec<bool>, with_words: bool) -> Vec<bool> {
        // Moves sorted by where they lead to.
        let mut starts = vec![0_usize; good.len() + 1];
        for to in &self.to {
            starts[(to & STATE) as usize + 1] += 1;
        }
        for state in 0..good.len() {
            starts[state + 1] += starts[state];
        }
        let mut from = vec![0_u32; self.to.len()];
        let mut free = starts.clone();
        let mut edge = 0;
        for (state, end) in self.ends.iter().enumerate() {
            while edge < *end {
                let to = (self.to[edge] & STATE) as usize;
                from[free[to]] = u32::try_from(state).expect("checked") | (self.to[edge] & !STATE);
                free[to] += 1;
                edge += 1;
            }
        }
        let mut open: Vec<usize> = (0..good.len()).filter(|&state| good[state]).collect();
        while let Some(state) = open.pop() {
            for &back in &from[starts[state]..starts[state + 1]] {
                let before = (back & STATE) as usize;
                if !good[before] && back & LATE == 0 && (with_words || back & WORD == 0) {
                    good[before] = true;
                    open.push(before);
                }
            }
        }
        good
    }
}

/// The first state from which no way leads to exactly one owner.
fn no_way_out(book: &mut Book, bounds: &Bounds, known: &Known, edges: &Edges) -> Option<usize> {
    let settled = known.worlds.iter().map(|world| checks::is_settled(book, bounds, world)).collect();
    let by_themselves = edges.backward(settled, false);
    let helped = |(state, world): (usize, &World)| {
        by_themselves[state] || checks::may_need_a_word(world) && operator::can_be_taken(book, bounds, world)
    };
    let good = known.worlds.iter().enumerate().map(helped).collect();
    let with_help = edges.backward(good, true);
    (0..known.worlds.len()).find(|&state| {
        let helps = checks::may_need_a_word(&known.worlds[state]) && with_help[state];
        !(by_themselves[state] || helps)
    })
}

/// A hash of small numbers, mixed by multiplication; the table below it takes it as it is.
#[derive(Default)]
struct Mix(u64);

impl Hasher for Mix {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }
    fn write_u8(&mut self, value: u8) {
        self.write_u64(u64::from(value));
    }
    fn write_u16(&mut self, value: u16) {
        self.write_u64(u64::from(value));
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    fn write_isize(&mut self, value: isize) {
        self.write_u64(value.unsigned_abs() as u64);
    }
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 32)
    }
}

#[derive(Default)]
struct Same(u64);

impl Hasher for Same {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.0 = self.0.rotate_left(8) ^ u64::from(*byte));
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
    fn finish(&self) -> u64 {
        self.0
    }
}
