// Package hydrate fills the base of a volume in the background, so that one day
// nothing is left to wait for.
//
// The nouns:
//
//   - A [Source] is the volume as the hydrator sees it: it plans and it warms.
//   - A run ([manifest.Run]) is what one ranged GET fetches: blocks of one pack,
//     a whole pack where nothing of it is in the cache yet.
//   - A [Hydrator] has the source plan leaf after leaf and warm run after run.
//   - A pass is one walk over the leaves. What fails for a reason of its own is
//     left behind for the next pass; the hydrator is done after a pass that left
//     nothing behind.
//   - The window is how many runs may be in flight. It grows by one in the time
//     all of them take, up to [Options.Workers], and halves, never below one,
//     when demand fetches are under way or the store is in trouble.
//
// Demand comes first: while any demand fetch is in flight no second run is
// started beside one that is running. One always may run, so hydration ends
// however busy the volume is.
//
// The hydrator keeps nothing durable. After a restart it plans from the first
// leaf again, and the source leaves out what the cache already holds.
package hydrate
