//! Results of experiments: their [format](results), and what is made of them.

pub mod results;
