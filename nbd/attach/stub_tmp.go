package attach

import "context"

func attachUBLK(ctx context.Context, n *Node, o Options) (driver, error) { return nil, ErrUnavailable }
func attachNBD(ctx context.Context, n *Node, o Options) (driver, error)  { return nil, ErrUnavailable }
func recoverUBLK(ctx context.Context, n *Node, o Options) (driver, error) {
	return nil, ErrUnavailable
}
func recoverNBD(ctx context.Context, n *Node, o Options) (driver, error) { return nil, ErrUnavailable }
func removeUBLK(ctx context.Context, s State) error                      { return nil }
func removeNBD(ctx context.Context, s State) error                       { return nil }
