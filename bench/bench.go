// Package bench is what the benchmarks of thaw share. It runs programs and
// measures what they used, alternates between the sides of a comparison,
// computes medians, and writes lines that benchstat reads. For real images it
// starts a thaw server, mounts a root from it, and runs a registry and a slow
// link.
//
// A benchmark is a command in a folder below this one. It compares thaw with a
// peer in the same run, one round of each side in turn, so that a change of the
// machine's speed affects both:
//
//	rec := bench.NewRecorder(os.Stdout)
//	err := bench.Alternate(ctx, 5,
//		func(ctx context.Context, round int) error {
//			u, err := bench.Run(exec.CommandContext(ctx, "thaw", "build", src, dst))
//			if err != nil {
//				return err
//			}
//			return rec.Add("Build/image=flask/tool=thaw", u.Measures()...)
//		},
//		func(ctx context.Context, round int) error { … the peer … })
//	fmt.Println(rec.Ratio("Build/image=flask/tool=peer", "Build/image=flask/tool=thaw", bench.Wall))
//
// Each round is a line, so that benchstat has the distribution. The tables in
// RESULTS.md have medians, and their ratios are medians of the rounds' ratios.
package bench

import "context"

// Alternate runs each side once per round, in order: A B A B. It returns the
// first error.
func Alternate(ctx context.Context, rounds int, sides ...func(ctx context.Context, round int) error) error {
	for round := range rounds {
		for _, side := range sides {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err := side(ctx, round); err != nil {
				return err
			}
		}
	}
	return nil
}
