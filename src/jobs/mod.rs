//! Long-running work that outlives a request and a crash: its states, its store (SQLite) and the runner that
//! takes accepted jobs one after another. What a job does is not known here.
