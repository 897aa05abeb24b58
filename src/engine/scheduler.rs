//! Which tokens the next step works on, and which pages of the cache belong to whom. Pure: no tensor, no clock, no
//! text; a sequence is a number of tokens.
//!
//! First come, first served. A sequence is admitted when a slot and all pages that it may ever need are free, so a
//! running sequence never waits for memory and nothing is ever evicted. Every step serves one token to each
//! decoding sequence and spends a budget on prompts: at least half of it on the oldest one, so that a long prompt
//! always moves, and the rest on those with the least left, so that a short prompt does not wait behind a long one.

use std::collections::VecDeque;

use crate::nn::kv_cache::PAGE_TOKENS;

/// Names a sequence for as long as it is known to the scheduler.
pub type SequenceId = u64;

/// Bounds of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sequences that run at once.
    pub max_batch: usize,
    /// Prompt tokens a step while others decode.
    pub prefill_chunk: usize,
    /// Prompt tokens a step while nobody waits for a token.
    pub prefill_alone: usize,
}

/// A sequence's part in one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slice {
    /// Whose.
    pub id: SequenceId,
    /// Position of the first token.
    pub start: usize,
    /// Tokens.
    pub count: usize,
}

#[derive(Debug)]
struct Running {
    id: SequenceId,
    /// Tokens that are known: the prompt, and what was generated.
    known: usize,
    /// Tokens whose keys and values are cached.
    cached: usize,
    pages: Vec<u32>,
}

/// The state between steps.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    /// (id, prompt tokens, pages that it may need)
    waiting: VecDeque<(SequenceId, usize, usize)>,
    /// In order of admission.
    running: Vec<Running>,
    free: Vec<u32>,
    pages: usize,
}

impl Scheduler {
    /// For a cache of `pages` pages.
    pub fn new(limits: Limits, pages: usize) -> Self {
        // Low pages first: what is never needed is never touched.
        Self {
            limits,
            waiting: VecDeque::new(),
            running: Vec::new(),
            free: (0..pages as u32).rev().collect(),
            pages,
        }
    }

    /// Puts a sequence of `prompt` tokens, and at most `total` in the end, in the line. `total` must fit the cache.
    pub fn submit(&mut self, id: SequenceId, prompt: usize, total: usize) {
        let pages = total.div_ceil(PAGE_TOKENS);
        assert!(prompt >= 1 && pages <= self.pages, "the handle refuses what cannot fit");
        self.waiting.push_back((id, prompt, pages));
    }

    /// Forgets a sequence, waiting or running, and frees its pages.
    pub fn remove(&mut self, id: SequenceId) {
        self.waiting.retain(|w| w.0 != id);
        if let Some(at) = self.running.iter().position(|r| r.id == id) {
            self.free.extend(self.running.remove(at).pages);
        }
    }

    /// Nothing waits and nothing runs.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Sequences that have a slot.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Tokens of cache that are reserved.
    pub fn reserved_tokens(&self) -> usize {
        (self.pages - self.free.len()) * PAGE_TOKENS
    }

    /// Pages of a running sequence.
    pub fn pages(&self, id: SequenceId) -> &[u32] {
        &self.running.iter().find(|r| r.id == id).expect("a running sequence").pages
    }

    /// Admits who can be admitted and chooses the next step's work. Each slice counts as cached from now on.
    pub fn schedule(&mut self) -> Vec<Slice> {
        while let Some(&(id, prompt, pages)) = self.waiting.front() {
            if self.running.len() >= self.limits.max_batch || self.free.len() < pages {
                break;
            }
            self.waiting.pop_front();
            let pages = self.free.split_off(self.free.len() - pages).into_iter().rev().collect();
            self.running.push(Running { id, known: prompt, cached: 0, pages });
        }
        let mut step = Vec::new();
        let mut prompts: Vec<usize> = Vec::new();
        for (at, r) in self.running.iter().enumerate() {
            match r.known - r.cached {
                0 => {}
                1 if r.cached > 0 => step.push(Slice { id: r.id, start: r.cached, count: 1 }),
                _ => prompts.push(at),
            }
        }
        let mut budget = if step.is_empty() { self.limits.prefill_alone } else { self.limits.prefill_chunk };
        let mut shares = vec![0; self.running.len()];
        let left = |at: usize, shares: &[usize]| {
            let r = &self.running[at];
            r.known - r.cached - shares[at]
        };
        if let Some(&oldest) = prompts.first() {
            let half = if prompts.len() > 1 { budget.div_ceil(2) } else { budget };
            shares[oldest] = left(oldest, &shares).min(half);
            budget -= shares[oldest];
            let mut by_rest = prompts.clone();
            by_rest.sort_by_key(|&at| left(at, &shares));
            for at in by_rest {
                let more = left(at, &shares).min(budget);
                shares[at] += more;
                budget -= more;
            }
        }
        for at in prompts {
            if shares[at] > 0 {
                let r = &self.running[at];
                step.push(Slice { id: r.id, start: r.cached, count: shares[at] });
            }
        }
        for slice in &step {
            let r = self.running.iter_mut().find(|r| r.id == slice.id).expect("just found");
            r.cached += slice.count;
        }
        step
    }

    /// Notes that a sequence got one more token, to be worked on in the next step.
    pub fn extend(&mut self, id: SequenceId) {
        self.running.iter_mut().find(|r| r.id == id).expect("a running sequence").known += 1;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limits(max_batch: usize, chunk: usize) -> Limits {
        Limits { max_batch, prefill_chunk: chunk, prefill_alone: 4 * chunk }
    }

    #[test]
    fn a_long_prompt_moves_and_a_short_one_does_not_wait_for_it() {
        let mut s = Scheduler::new(limits(4, 8), 100);
        s.submit(1, 20, 30);
        assert_eq!(s.schedule(), vec![Slice { id: 1, start: 0, count: 20 }], "alone: the larger budget");
        s.extend(1);
        s.submit(2, 600, 610);
        s.submit(3, 4, 10);
        let step = s.schedule();
        assert_eq!(step[0], Slice { id: 1, start: 20, count: 1 });
        assert_eq!(step[1], Slice { id: 2, start: 0, count: 4 }, "half for the oldest");
        assert_eq!(step[2], Slice { id: 3, start: 0, count: 4 }, "the short one at once");
        s.extend(1);
        s.extend(3);
        let step = s.schedule();
        assert_eq!(step.iter().find(|x| x.id == 2).expect("moves").count, 8, "all of the budget when alone");
        assert_eq!(step.iter().filter(|x| x.count == 1).count(), 2);
    }

    #[test]
    fn first_come_first_served_and_no_page_is_promised_twice() {
        let mut s = Scheduler::new(limits(8, 64), 4);
        s.submit(1, 20, 40);
        s.submit(2, 20, 40);
        s.submit(3, 1, 2);
        assert_eq!(
            s.schedule().iter().map(|x| x.id).collect::<Vec<_>>(),
            vec![1],
            "2 waits, and 3 behind it"
        );
        assert_eq!(s.reserved_tokens(), 48);
        s.remove(1);
        assert_eq!(s.schedule().iter().map(|x| x.id).collect::<Vec<_>>(), vec![2, 3]);
        s.remove(2);
        s.remove(3);
        assert!(s.is_idle());
        assert_eq!(s.reserved_tokens(), 0);
    }

    proptest! {
        /// Whatever comes and goes: every token of every sequence is worked on exactly once and in order, no page
        /// has two owners, the bounds hold, and everybody ends.
        #[test]
        fn every_sequence_is_served_in_order(
            requests in prop::collection::vec((1usize..200, 1usize..40, 0usize..6), 1..30),
            max_batch in 1usize..6,
            chunk in 1usize..40,
        ) {
            let pages = 20;
            let mut s = Scheduler::new(limits(max_batch, chunk), pages);
            let mut done: Vec<usize> = vec![0; requests.len()];
            let mut new: Vec<usize> = vec![0; requests.len()];
            let mut next = 0;
            let mut alive = 0usize;
            for step in 0..20_000 {
                while next < requests.len() && (alive == 0 || requests[next].2 <= step % 6) {
                    let (prompt, answer, _) = requests[next];
                    s.submit(next as u64, prompt, (prompt + answer).min(pages * PAGE_TOKENS));
                    next += 1;
                    alive += 1;
                }
                if s.is_idle() { break; }
                let work = s.schedule();
                prop_assert!(!work.is_empty(), "a step without work would spin");
                prop_assert!(s.running() <= max_batch);
                let mut owned: Vec<u32> = Vec::new();
                for slice in &work {
                    let id = slice.id as usize;
                    prop_assert_eq!(slice.start, done[id]);
                    done[id] += slice.count;
                    owned.extend(s.pages(slice.id));
                    prop_assert!(done[id] <= s.pages(slice.id).len() * PAGE_TOKENS);
                }
                let count = owned.len();
                owned.sort_unstable();
                owned.dedup();
                prop_assert_eq!(owned.len(), count, "a page with two owners");
                for slice in work {
                    let id = slice.id as usize;
                    if done[id] >= requests[id].0 {
                        new[id] += 1;
                        if new[id] == requests[id].1 { s.remove(slice.id); alive -= 1; } else { s.extend(slice.id); }
                    }
                }
            }
            prop_assert!(s.is_idle() && next == requests.len());
            prop_assert_eq!(s.reserved_tokens(), 0);
        }
    }
}
