// Package bench is what the benchmarks of thaw share: running programs and
// saying what they took, rounds that alternate between the sides of a
// comparison, medians, output that benchstat reads, and the set-up that real
// images need: a thaw server, a root mounted from it, a registry, a slow link.
//
// A benchmark is a command in a folder below this one. It compares with a peer
// in the same run, a round of one side after a round of the other, so that what
// drifts on the machine hits both:
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
// Every round is a line, so benchstat has the distribution; the tables in
// README.md have medians, and ratios are medians of the rounds' own ratios.
package bench

import "context"

// Alternate runs every side once a round, in order: A B A B. It ends with the
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
